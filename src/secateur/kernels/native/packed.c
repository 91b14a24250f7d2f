/* Products with a sparse matrix that stays packed: y = x Wᵀ for one to eight rows of x.
 *
 * A row of W is cut into words of 64 columns. `bitmap` has one bit for each column, bit j of word k for column
 * 64 k + j, set where the weight is kept; `values` holds the kept weights of all rows in order, `starts[r]` the place
 * of row r's first one, and 64 bytes after the last value may be read. x is [batch][64 * words], zero where W has no
 * column. y is [batch][rows] in float.
 *
 * Plain C with no Python and no torch in it, so one build serves every version of both. Each routine exists for several
 * instruction sets, chosen at run time; the portable one is the definition of the others. They take `count` rows of W
 * side by side, so that what is loaded of x serves all of them and there are as many independent chains of sums.
 */
#include "packed.h"

int secateur_isa(void) {
#ifdef X86
#ifdef EMULATED
    return AVX512_BF16;
#else
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
#endif
    return PORTABLE;
}

/* What a routine for rows takes. `apart` is the distance of the rows that are taken together, `stride` that of the
 * rows of y. */
#define ROWS_OF(TYPE, INPUT)                                                                                       \
    const uint64_t *bitmap, const TYPE *values, const int64_t *starts, const INPUT *x, float *y, int64_t words,    \
        int64_t stride, int64_t row, int64_t apart, const int count, const int batch

enum { TOGETHER = 4 }; /* rows at once, at most */

/* Where the masks and the values of the rows that are taken together begin. */
#define BEGIN_ROWS(TYPE)                                                                                           \
    const uint64_t *masks[TOGETHER];                                                                               \
    const TYPE *from[TOGETHER];                                                                                    \
    for (int i = 0; i < count; i++) {                                                                              \
        masks[i] = bitmap + (row + i * apart) * words;                                                             \
        from[i] = values + starts[row + i * apart];                                                                \
    }

/* From a routine for rows one for a thread's share: some rows at a time, the last ones alone. */
#define SHARE(NAME, ROUTINE, TYPE, INPUT, IN_TURN)                                                                 \
    static void NAME(const uint64_t *bitmap, const TYPE *values, const int64_t *starts, const INPUT *x, float *y,  \
                     int64_t rows, int64_t words, int batch, int64_t first, int64_t last) {                        \
        EACH_BATCH(IN_TURN, ROUTINE)                                                                               \
    }
#define BY(COUNT, ROUTINE, BATCH)                                                                                  \
    {                                                                                                              \
        int64_t apart = (last - first) / (COUNT), r = first;                                                       \
        for (; r < first + apart; r++)                                                                             \
            ROUTINE(bitmap, values, starts, x, y, words, rows, r, apart, COUNT, BATCH);                            \
        for (r += ((COUNT) - 1) * apart; r < last; r++)                                                            \
            ROUTINE(bitmap, values, starts, x, y, words, rows, r, 0, 1, BATCH);                                    \
    }
#define IN_PAIRS(ROUTINE, BATCH) BY(2, ROUTINE, BATCH)
#define IN_FOURS(ROUTINE, BATCH) BY(4, ROUTINE, BATCH)
#define IN_FOURS_OR_PAIRS(ROUTINE, BATCH) BY(BATCH < 3 ? 4 : 2, ROUTINE, BATCH)

/* Registers hold the sums of some rows and four activations; a larger batch takes two turns at the same rows. */
#define TWICE(NAME, TYPE, INPUT, PLANES)                                                                           \
    INLINED void NAME##_twice(ROWS_OF(TYPE, INPUT)) {                                                              \
        NAME(bitmap, values, starts, x, y, words, stride, row, apart, count, batch > 4 ? 4 : batch);               \
        if (batch > 4)                                                                                             \
            NAME(bitmap, values, starts, x + 4 * PLANES * 64 * words, y + 4 * stride, words, stride, row, apart,   \
                 count, batch - 4);                                                                                \
    }

#define PORTABLE_ROWS(NAME, TYPE, WIDE)                                                                            \
    INLINED void NAME(ROWS_OF(TYPE, float)) {                                                                      \
        for (int i = 0; i < count; i++) {                                                                          \
            int64_t r = row + i * apart;                                                                           \
            const TYPE *from = values + starts[r];                                                                 \
            float sum[MOST] = {0};                                                                                 \
            for (int64_t k = 0; k < words; k++)                                                                    \
                for (uint64_t left = bitmap[r * words + k]; left; left &= left - 1) {                              \
                    const float *at = x + 64 * k + __builtin_ctzll(left);                                          \
                    float value = WIDE(*from++);                                                                   \
                    for (int b = 0; b < batch; b++) sum[b] += value * at[b * 64 * words];                          \
                }                                                                                                  \
            for (int b = 0; b < batch; b++) y[r + b * stride] = sum[b];                                            \
        }                                                                                                          \
    }
#define AS_FLOAT(v) ((float)(v))
PORTABLE_ROWS(portable_rows_bf16, uint16_t, widen)
PORTABLE_ROWS(portable_rows_f32, float, AS_FLOAT)
PORTABLE_ROWS(portable_rows_i8, int8_t, AS_FLOAT)
SHARE(portable_bf16, portable_rows_bf16, uint16_t, float, IN_PAIRS)
SHARE(portable_f32, portable_rows_f32, float, float, IN_PAIRS)
SHARE(portable_i8, portable_rows_i8, int8_t, float, IN_PAIRS)

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
/* For each byte of the bitmap where the kept values of eight columns go: AVX2 has a shuffle but no expand. The bytes of
 * a value land at the top of a float's four, where bfloat16 is a float already and int8 an integer times 2^24. */
static int8_t spread8[256][32] __attribute__((aligned(64)));
static int8_t spread16[256][32] __attribute__((aligned(64)));
static int32_t spread32[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
    memset(spread8, -1, sizeof spread8);
    memset(spread16, -1, sizeof spread16);
    for (int mask = 0; mask < 256; mask++)
        for (int j = 0, count = 0; j < 8; j++) {
            int kept = mask >> j & 1;
            spread32[mask][j] = kept ? count : -1;
            if (kept) {
                spread8[mask][4 * j + 3] = count;
                spread16[mask][4 * j + 2] = 2 * count;
                spread16[mask][4 * j + 3] = 2 * count + 1;
            }
            count += kept;
        }
}

INLINED __m256 spread_bf16(const uint16_t *values, unsigned mask) {
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i *)spread16[mask])));
}

INLINED __m256 spread_i8(const int8_t *values, unsigned mask) {
    __m256i often = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)values));
    __m256i placed = _mm256_shuffle_epi8(often, _mm256_load_si256((const __m256i *)spread8[mask]));
    return _mm256_cvtepi32_ps(placed);
}

INLINED __m256 spread_f32(const float *values, unsigned mask) {
    __m256i places = _mm256_load_si256((const __m256i *)spread32[mask]);
    __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), placed);
}

/* No prefetch here: on Zen 3 the processor's own is faster by an eighth. */
#define AVX2_ROWS(NAME, TYPE, SPREAD, SCALE)                                                                       \
    INLINED void NAME(ROWS_OF(TYPE, float)) {                                                                      \
        BEGIN_ROWS(TYPE)                                                                                           \
        __m256 sum[2][MOST];                                                                                       \
        for (int i = 0; i < count; i++)                                                                            \
            for (int b = 0; b < batch; b++) sum[i][b] = _mm256_setzero_ps();                                       \
        __m256 more[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}; /* a second chain at batch 1 */               \
        for (int64_t k = 0; k < words; k++) {                                                                      \
            uint64_t word[2];                                                                                      \
            for (int i = 0; i < count; i++) word[i] = masks[i][k];                                                 \
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++) {                                                  \
                __m256 weight[2];                                                                                  \
                for (int i = 0; i < count; i++) {                                                                  \
                    unsigned mask = word[i] >> 8 * j & 255;                                                        \
                    weight[i] = SPREAD(from[i], mask);                                                             \
                    from[i] += __builtin_popcount(mask);                                                           \
                }                                                                                                  \
                const float *at = x + 64 * k + 8 * j;                                                              \
                for (int b = 0; b < batch; b++) {                                                                  \
                    __m256 seen = _mm256_loadu_ps(at + b * 64 * words);                                            \
                    for (int i = 0; i < count; i++) {                                                              \
                        __m256 *chain = batch == 1 && j % 2 ? &more[i] : &sum[i][b];                               \
                        *chain = _mm256_fmadd_ps(weight[i], seen, *chain);                                         \
                    }                                                                                              \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        for (int i = 0; i < count; i++)                                                                            \
            for (int b = 0; b < batch; b++)                                                                        \
                y[row + i * apart + b * stride] =                                                                  \
                    SCALE * sum8(batch == 1 ? _mm256_add_ps(sum[i][b], more[i]) : sum[i][b]);                      \
    }
AVX2_ROWS(avx2_rows_bf16, uint16_t, spread_bf16, 1.0f)
AVX2_ROWS(avx2_rows_f32, float, spread_f32, 1.0f)
AVX2_ROWS(avx2_rows_i8, int8_t, spread_i8, 0x1p-24f)
TWICE(avx2_rows_bf16, uint16_t, float, 1)
TWICE(avx2_rows_f32, float, float, 1)
TWICE(avx2_rows_i8, int8_t, float, 1)
SHARE(avx2_bf16, avx2_rows_bf16_twice, uint16_t, float, IN_PAIRS)
SHARE(avx2_f32, avx2_rows_f32_twice, float, float, IN_PAIRS)
SHARE(avx2_i8, avx2_rows_i8_twice, int8_t, float, IN_PAIRS)
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
#ifndef EMULATED
/* Expand with zeros depends on the old content of its register on Zen 4, though it should not; clearing it first
 * breaks the chain and doubles the speed. A masked load reads only the values that it needs. */
#define EXPAND(NAME, INSTRUCTION)                                                                                  \
    static inline __m512i NAME(uint64_t mask, const void *values) {                                                \
        __m512i placed;                                                                                            \
        __asm__("vpxor %x0,%x0,%x0\n\t" INSTRUCTION " %2,%0%{%1%}"                                                 \
                : "=&x"(placed)                                                                                    \
                : "Yk"((__mmask64)mask), "m"(*(const __m512i *)values));                                           \
        return placed;                                                                                             \
    }
EXPAND(expand8, "vpexpandb")
EXPAND(expand16, "vpexpandw")
EXPAND(expand32, "vpexpandd")
#endif

/* Without dot products of bfloat16. Words of 32 bits hold two weights, of which the upper is a float but for its lower
 * bits; so x is given as floats, of every 32 first the even ones, then the odd ones (`widened`). */
INLINED void avx512_rows_bf16(ROWS_OF(uint16_t, float)) {
    BEGIN_ROWS(uint16_t)
    __m512 even[TOGETHER][MOST], odd[TOGETHER][MOST]; /* two chains where there are few sums, else one */
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) even[i][b] = odd[i][b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        for (int i = 0; i < count; i++) _mm_prefetch((const char *)from[i] + 2048, _MM_HINT_T0);
        _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
            __m512 lower[TOGETHER], higher[TOGETHER];
            for (int i = 0; i < count; i++) {
                uint32_t mask = masks[i][k] >> 32 * half;
                __m512i pairs = expand16(mask, from[i]);
                lower[i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
                higher[i] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
                from[i] += __builtin_popcount(mask);
            }
            for (int b = 0; b < batch; b++) {
                const float *at = x + 64 * (k + b * words) + 32 * half;
                __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + 16);
                for (int i = 0; i < count; i++) {
                    __m512 *chain = batch < 3 ? &odd[i][b] : &even[i][b];
                    even[i][b] = _mm512_fmadd_ps(lower[i], first, even[i][b]);
                    *chain = _mm512_fmadd_ps(higher[i], second, *chain);
                }
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++)
            y[row + i * apart + b * stride] = _mm512_reduce_add_ps(_mm512_add_ps(even[i][b], odd[i][b]));
}

INLINED void avx512_rows_f32(ROWS_OF(float, float)) {
    BEGIN_ROWS(float)
    __m512 sum[TOGETHER][MOST];
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) sum[i][b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        for (int i = 0; i < count; i++) {
            _mm_prefetch((const char *)from[i] + 4096, _MM_HINT_T0);
            _mm_prefetch((const char *)from[i] + 4160, _MM_HINT_T0);
        }
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
            __m512 weight[TOGETHER];
            for (int i = 0; i < count; i++) {
                unsigned mask = masks[i][k] >> 16 * j & 0xffff;
                weight[i] = _mm512_castsi512_ps(expand32(mask, from[i]));
                from[i] += __builtin_popcount(mask);
            }
            const float *at = x + 64 * k + 16 * j;
            for (int b = 0; b < batch; b++) {
                __m512 seen = _mm512_loadu_ps(at + b * 64 * words);
                for (int i = 0; i < count; i++) sum[i][b] = _mm512_fmadd_ps(weight[i], seen, sum[i][b]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) y[row + i * apart + b * stride] = _mm512_reduce_add_ps(sum[i][b]);
}

/* Activations are integers of 16 bits here, x = step * (256 high + low - 32768): high and low bytes [2][64 * words] of
 * every row of x. Their products with the weights are exact; y is left in units of the step. */
INLINED void avx512_rows_i8(ROWS_OF(int8_t, uint8_t)) {
    BEGIN_ROWS(int8_t)
    __m512i high[TOGETHER][MOST], low[TOGETHER][MOST], total[TOGETHER];
    const __m512i ones = _mm512_set1_epi8(1);
    for (int i = 0; i < count; i++) {
        total[i] = _mm512_setzero_si512();
        for (int b = 0; b < batch; b++) high[i][b] = low[i][b] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < words; k++) {
        __m512i weight[TOGETHER];
        for (int i = 0; i < count; i++) {
            uint64_t mask = masks[i][k];
            _mm_prefetch((const char *)from[i] + 4096, _MM_HINT_T0);
            weight[i] = expand8(mask, from[i]);
            total[i] = _mm512_dpbusd_epi32(total[i], ones, weight[i]);
            from[i] += __builtin_popcountll(mask);
        }
        for (int b = 0; b < batch; b++) {
            const uint8_t *at = x + 64 * (k + 2 * b * words);
            __m512i first = _mm512_loadu_si512(at), second = _mm512_loadu_si512(at + 64 * words);
            for (int i = 0; i < count; i++) {
                high[i][b] = _mm512_dpbusd_epi32(high[i][b], first, weight[i]);
                low[i][b] = _mm512_dpbusd_epi32(low[i][b], second, weight[i]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) {
            int64_t upper = _mm512_reduce_add_epi32(high[i][b]), lower = _mm512_reduce_add_epi32(low[i][b]);
            int64_t weights = _mm512_reduce_add_epi32(total[i]);
            y[row + i * apart + b * stride] = (float)(256 * upper + lower - 32768 * weights);
        }
}

TWICE(avx512_rows_bf16, uint16_t, float, 1)
TWICE(avx512_rows_f32, float, float, 1)
TWICE(avx512_rows_i8, int8_t, uint8_t, 2)
SHARE(avx512_bf16, avx512_rows_bf16_twice, uint16_t, float, IN_FOURS)
SHARE(avx512_f32, avx512_rows_f32_twice, float, float, IN_FOURS)
SHARE(avx512_i8, avx512_rows_i8_twice, int8_t, uint8_t, IN_FOURS_OR_PAIRS)
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
INLINED void avx512_bf16_rows(ROWS_OF(uint16_t, uint16_t)) {
    BEGIN_ROWS(uint16_t)
    __m512 low[2][MOST], high[2][MOST]; /* two chains where there are few sums, else one */
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) low[i][b] = high[i][b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        __m512bh left[2], right[2];
        for (int i = 0; i < count; i++) {
            uint64_t mask = masks[i][k];
            _mm_prefetch((const char *)from[i] + 4096, _MM_HINT_T0);
            left[i] = (__m512bh)expand16((uint32_t)mask, from[i]);
            right[i] = (__m512bh)expand16(mask >> 32, from[i] + __builtin_popcount((uint32_t)mask));
            from[i] += __builtin_popcountll(mask);
        }
        for (int b = 0; b < batch; b++) {
            const uint16_t *at = x + 64 * (k + b * words);
            __m512bh first = BF16S(at), second = BF16S(at + 32);
            for (int i = 0; i < count; i++) {
                __m512 *chain = batch < 3 ? &high[i][b] : &low[i][b];
                low[i][b] = _mm512_dpbf16_ps(low[i][b], left[i], first);
                *chain = _mm512_dpbf16_ps(*chain, right[i], second);
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++)
            y[row + i * apart + b * stride] = _mm512_reduce_add_ps(_mm512_add_ps(low[i][b], high[i][b]));
}

SHARE(avx512_bf16_bf16, avx512_bf16_rows, uint16_t, uint16_t, IN_PAIRS)
#pragma GCC pop_options
#endif

#ifdef X86
#define UP_TO_AVX2(isa, NAME) ((isa) == AVX2 ? avx2_##NAME : portable_##NAME)
#else
#define UP_TO_AVX2(isa, NAME) ((void)(isa), portable_##NAME)
#endif
#define SHARES(TYPE)                                                                                               \
    void (*share)(const uint64_t *, const TYPE *, const int64_t *, const float *, float *, int64_t, int64_t, int,  \
                  int64_t, int64_t)

/* y [batch][rows] = x [batch][64 * words] Wᵀ for float values; 0, or 1 for a batch that is too large. */
int secateur_multiply_f32(int isa, const uint64_t *bitmap, const float *values, const int64_t *starts, const float *x,
                          float *y, int64_t rows, int64_t words, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
    SHARES(float) = FASTEST(isa, f32);
    EACH_THREAD(share(bitmap, values, starts, x, y, rows, words, batch, first, last);)
    return 0;
}

/* The same for bfloat16 values and activations; 2 where there is no memory for the widened activations. */
int secateur_multiply_bf16(int isa, const uint64_t *bitmap, const uint16_t *values, const int64_t *starts,
                           const uint16_t *activations, float *y, int64_t rows, int64_t words, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
#ifdef X86
    if (isa == AVX512_BF16) {
        EACH_THREAD(avx512_bf16_bf16(bitmap, values, starts, activations, y, rows, words, batch, first, last);)
        return 0;
    }
#endif
    float *x = widened(isa, activations, 64 * words * batch);
    if (!x) return 2;
    SHARES(uint16_t) = FASTEST(isa, bf16);
    EACH_THREAD(share(bitmap, values, starts, x, y, rows, words, batch, first, last);)
    free(x);
    return 0;
}

/* The same for int8 values, each row of W with its own scale; activations are float. AVX-512 takes them as integers of
 * 16 bits, which adds an error of 2^-16 of the largest one of a row at most; the others take them as they are. */
int secateur_multiply_i8(int isa, const uint64_t *bitmap, const int8_t *values, const int64_t *starts,
                         const float *scales, const float *x, float *y, int64_t rows, int64_t words, int batch,
                         int threads) {
    if (batch < 1 || batch > MOST) return 1;
    float steps[MOST] = {1, 1, 1, 1, 1, 1, 1, 1};
#ifdef X86
    if (isa >= AVX512) {
        int64_t columns = 64 * words;
        uint8_t *bytes = malloc(2 * columns * batch);
        if (!bytes) return 2;
        for (int b = 0; b < batch; b++) as_bytes(x + b * columns, bytes + 2 * b * columns, columns, steps + b);
        EACH_THREAD(avx512_i8(bitmap, values, starts, bytes, y, rows, words, batch, first, last);)
        free(bytes);
    } else
#endif
    {
        SHARES(int8_t) = UP_TO_AVX2(isa, i8);
        EACH_THREAD(share(bitmap, values, starts, x, y, rows, words, batch, first, last);)
    }
    for (int b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++) y[b * rows + r] *= steps[b] * scales[r];
    return 0;
}

/* out [rows][64 * words] = the rows of a packed matrix from the first one that `bitmap` and `starts` point to, dense:
 * as they are stored, or as floats, with the scale of each row for int8. */
#define PORTABLE_DENSE(NAME, TYPE, OUT, WIDE)                                                                      \
    static void NAME(const uint64_t *bitmap, const TYPE *values, OUT *out, int64_t words, float scale) {           \
        (void)scale;                                                                                               \
        memset(out, 0, sizeof(OUT) * 64 * words);                                                                  \
        for (int64_t k = 0; k < words; k++)                                                                        \
            for (uint64_t left = bitmap[k]; left; left &= left - 1) out[64 * k + __builtin_ctzll(left)] = WIDE;    \
    }
PORTABLE_DENSE(portable_unpack_bf16, uint16_t, uint16_t, *values++)
PORTABLE_DENSE(portable_unpack_f32, float, float, *values++)
PORTABLE_DENSE(portable_widen_bf16, uint16_t, float, widen(*values++))
PORTABLE_DENSE(portable_widen_i8, int8_t, float, scale * *values++)

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
#define AVX2_DENSE(NAME, TYPE, OUT, STORE)                                                                         \
    static void NAME(const uint64_t *bitmap, const TYPE *values, OUT *out, int64_t words, float scale) {           \
        (void)scale;                                                                                               \
        for (int64_t k = 0; k < words; k++)                                                                        \
            _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++, out += 8) {                                        \
                unsigned mask = bitmap[k] >> 8 * j & 255;                                                          \
                STORE;                                                                                             \
                values += __builtin_popcount(mask);                                                                \
            }                                                                                                      \
    }
INLINED void store_upper(uint16_t *out, __m256 wide) { /* the upper half of each float */
    __m256i halves = _mm256_srli_epi32(_mm256_castps_si256(wide), 16);
    __m256i packed = _mm256_packus_epi32(halves, halves);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
AVX2_DENSE(avx2_unpack_bf16, uint16_t, uint16_t, store_upper(out, spread_bf16(values, mask)))
AVX2_DENSE(avx2_unpack_f32, float, float, _mm256_storeu_ps(out, spread_f32(values, mask)))
AVX2_DENSE(avx2_widen_bf16, uint16_t, float, _mm256_storeu_ps(out, spread_bf16(values, mask)))
AVX2_DENSE(avx2_widen_i8, int8_t, float,
           _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_set1_ps(0x1p-24f * scale), spread_i8(values, mask))))
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
#define AVX512_DENSE(NAME, TYPE, OUT, PIECE, STORE)                                                                \
    static void NAME(const uint64_t *bitmap, const TYPE *values, OUT *out, int64_t words, float scale) {           \
        (void)scale;                                                                                               \
        for (int64_t k = 0; k < words; k++)                                                                        \
            for (int j = 0; j < 64; j += PIECE, out += PIECE) {                                                    \
                uint64_t mask = bitmap[k] >> j & ((1ull << PIECE) - 1);                                            \
                STORE;                                                                                             \
                values += __builtin_popcountll(mask);                                                              \
            }                                                                                                      \
    }
#define LOWER(v) _mm512_castsi512_si256(v)
#define LEAST(v) _mm512_castsi512_si128(v)
AVX512_DENSE(avx512_unpack_bf16, uint16_t, uint16_t, 32, _mm512_storeu_si512(out, expand16(mask, values)))
AVX512_DENSE(avx512_unpack_f32, float, float, 16, _mm512_storeu_si512(out, expand32(mask, values)))
AVX512_DENSE(avx512_widen_bf16, uint16_t, float, 16,
             _mm512_storeu_si512(out, _mm512_slli_epi32(_mm512_cvtepu16_epi32(LOWER(expand16(mask, values))), 16)))
AVX512_DENSE(avx512_widen_i8, int8_t, float, 16,
             _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
                                                                            LEAST(expand8(mask, values)))))))
#pragma GCC pop_options
#endif

#define DENSE(NAME, ROUTINE, TYPE, OUT)                                                                            \
    void NAME(int isa, const uint64_t *bitmap, const TYPE *values, const int64_t *starts, const float *scales,     \
              OUT *out, int64_t rows, int64_t words, int threads) {                                                \
        void (*row)(const uint64_t *, const TYPE *, OUT *, int64_t, float) = FASTEST(isa, ROUTINE);                \
        EACH_THREAD(for (int64_t r = first; r < last; r++)                                                         \
                        row(bitmap + r * words, values + starts[r], out + 64 * words * r, words,                   \
                            scales ? scales[r] : 1);)                                                              \
    }
DENSE(secateur_unpack_bf16, unpack_bf16, uint16_t, uint16_t)
DENSE(secateur_unpack_f32, unpack_f32, float, float)
DENSE(secateur_widen_bf16, widen_bf16, uint16_t, float)
DENSE(secateur_widen_i8, widen_i8, int8_t, float)
