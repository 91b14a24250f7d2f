/* Products with a sparse matrix that stays packed: y = x Wᵀ for one to eight rows of x.
 *
 * A row of W is cut into words of 64 columns. `bitmap` has one bit for each column, bit j of word k for column
 * 64 k + j, set where the weight is kept; `values` holds the kept weights of all rows in order, `starts[r]` the place
 * of row r's first one, and 64 bytes after the last value may be read. x is [batch][64 * words], zero where W has no
 * column. y is [batch][rows] in float.
 *
 * Plain C with no Python and no torch in it, so one build serves every version of both. Each routine exists for several
 * instruction sets, chosen at run time; the portable one is the definition of the others.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 }; /* AVX512: with VBMI2 (expand 16 bits) and BF16 (dot product) */
enum { MOST = 8 };                           /* rows of x at once */

int secateur_isa(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

static inline float widen(uint16_t bits) { /* bfloat16 is the upper half of a float */
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* One row of W with each row of x, for bfloat16 and for float values. */
#define PORTABLE_ROW(NAME, TYPE, WIDE)                                                                             \
    static void NAME(const uint64_t *bitmap, const TYPE *values, const float *x, float *y, int64_t words,          \
                     int64_t stride, int batch) {                                                                  \
        float sum[MOST] = {0};                                                                                     \
        for (int64_t k = 0; k < words; k++)                                                                        \
            for (uint64_t left = bitmap[k]; left; left &= left - 1) {                                              \
                const float *at = x + 64 * k + __builtin_ctzll(left);                                              \
                float value = WIDE(*values++);                                                                     \
                for (int b = 0; b < batch; b++) sum[b] += value * at[b * 64 * words];                              \
            }                                                                                                      \
        for (int b = 0; b < batch; b++) y[b * stride] = sum[b];                                                    \
    }
#define SAME(v) (v)
PORTABLE_ROW(portable_bf16, uint16_t, widen)
PORTABLE_ROW(portable_f32, float, SAME)

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
/* For each byte of the bitmap where the kept values of eight columns go: AVX2 has a shuffle but no expand. */
static uint8_t spread16[256][16] __attribute__((aligned(64)));
static int32_t spread32[256][8] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int j = 0, count = 0; j < 8; j++) {
            int kept = mask >> j & 1;
            spread16[mask][2 * j] = kept ? 2 * count : 0x80;
            spread16[mask][2 * j + 1] = kept ? 2 * count + 1 : 0x80;
            spread32[mask][j] = kept ? count : -1;
            count += kept;
        }
}

static inline float sum8(__m256 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline __m256 spread_bf16(const uint16_t *values, unsigned mask) {
    __m128i packed = _mm_loadu_si128((const __m128i *)values);
    __m128i placed = _mm_shuffle_epi8(packed, _mm_load_si128((const __m128i *)spread16[mask]));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(placed), 16));
}

static inline __m256 spread_f32(const float *values, unsigned mask) {
    __m256i places = _mm256_load_si256((const __m256i *)spread32[mask]);
    __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), placed);
}

#define AVX2_ROW(NAME, TYPE, SPREAD)                                                                               \
    static void NAME(const uint64_t *bitmap, const TYPE *values, const float *x, float *y, int64_t words,          \
                     int64_t stride, int batch) {                                                                  \
        __m256 sum[MOST];                                                                                          \
        for (int b = 0; b < batch; b++) sum[b] = _mm256_setzero_ps();                                              \
        for (int64_t k = 0; k < words; k++) {                                                                      \
            uint64_t mask = bitmap[k];                                                                             \
            _mm_prefetch((const char *)values + 4096, _MM_HINT_T0);                                                \
            for (int j = 0; j < 8; j++, mask >>= 8) {                                                              \
                __m256 weight = SPREAD(values, mask & 255);                                                        \
                values += _mm_popcnt_u32(mask & 255);                                                              \
                const float *at = x + 64 * k + 8 * j;                                                              \
                for (int b = 0; b < batch; b++)                                                                    \
                    sum[b] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(at + b * 64 * words), sum[b]);                \
            }                                                                                                      \
        }                                                                                                          \
        for (int b = 0; b < batch; b++) y[b * stride] = sum8(sum[b]);                                              \
    }
AVX2_ROW(avx2_bf16, uint16_t, spread_bf16)
AVX2_ROW(avx2_f32, float, spread_f32)
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,fma,avx2,bmi,bmi2")
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
EXPAND(expand16, "vpexpandw")
EXPAND(expand32, "vpexpandd")

#define ACTIVATIONS(p) ((__m512bh)_mm512_loadu_si512(p))

static inline void avx512_row_bf16(const uint64_t *bitmap, const uint16_t *values, const uint16_t *x, float *y,
                                   int64_t words, int64_t stride, const int batch) {
    __m512 sum[MOST];
    for (int b = 0; b < batch; b++) sum[b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        uint64_t mask = bitmap[k];
        _mm_prefetch((const char *)values + 4096, _MM_HINT_T0);
        __m512bh low = (__m512bh)expand16((uint32_t)mask, values);
        __m512bh high = (__m512bh)expand16(mask >> 32, values + _mm_popcnt_u32((uint32_t)mask));
        values += _mm_popcnt_u64(mask);
        for (int b = 0; b < batch; b++) {
            const uint16_t *at = x + 64 * (k + b * words);
            sum[b] = _mm512_dpbf16_ps(sum[b], low, ACTIVATIONS(at));
            sum[b] = _mm512_dpbf16_ps(sum[b], high, ACTIVATIONS(at + 32));
        }
    }
    for (int b = 0; b < batch; b++) y[b * stride] = _mm512_reduce_add_ps(sum[b]);
}

/* Two rows side by side with one row of x: two streams of values, each activation loaded once. */
static void avx512_pair_bf16(const uint64_t *bitmap0, const uint64_t *bitmap1, const uint16_t *values0,
                             const uint16_t *values1, const uint16_t *x, float *y0, float *y1, int64_t words) {
    __m512 low0 = _mm512_setzero_ps(), high0 = low0, low1 = low0, high1 = low0;
    for (int64_t k = 0; k < words; k++) {
        uint64_t mask0 = bitmap0[k], mask1 = bitmap1[k];
        __m512bh left = ACTIVATIONS(x + 64 * k), right = ACTIVATIONS(x + 64 * k + 32);
        _mm_prefetch((const char *)values0 + 4096, _MM_HINT_T0);
        _mm_prefetch((const char *)values1 + 4096, _MM_HINT_T0);
        low0 = _mm512_dpbf16_ps(low0, (__m512bh)expand16((uint32_t)mask0, values0), left);
        high0 = _mm512_dpbf16_ps(
            high0, (__m512bh)expand16(mask0 >> 32, values0 + _mm_popcnt_u32((uint32_t)mask0)), right);
        low1 = _mm512_dpbf16_ps(low1, (__m512bh)expand16((uint32_t)mask1, values1), left);
        high1 = _mm512_dpbf16_ps(
            high1, (__m512bh)expand16(mask1 >> 32, values1 + _mm_popcnt_u32((uint32_t)mask1)), right);
        values0 += _mm_popcnt_u64(mask0);
        values1 += _mm_popcnt_u64(mask1);
    }
    *y0 = _mm512_reduce_add_ps(_mm512_add_ps(low0, high0));
    *y1 = _mm512_reduce_add_ps(_mm512_add_ps(low1, high1));
}

static void avx512_row_f32(const uint64_t *bitmap, const float *values, const float *x, float *y, int64_t words,
                           int64_t stride, int batch) {
    __m512 sum[MOST];
    for (int b = 0; b < batch; b++) sum[b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
        uint64_t mask = bitmap[k];
        _mm_prefetch((const char *)values + 4096, _MM_HINT_T0);
        _mm_prefetch((const char *)values + 4160, _MM_HINT_T0);
        for (int j = 0; j < 4; j++, mask >>= 16) {
            __m512 weight = _mm512_castsi512_ps(expand32(mask & 0xffff, values));
            values += _mm_popcnt_u32(mask & 0xffff);
            const float *at = x + 64 * k + 16 * j;
            for (int b = 0; b < batch; b++)
                sum[b] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(at + b * 64 * words), sum[b]);
        }
    }
    for (int b = 0; b < batch; b++) y[b * stride] = _mm512_reduce_add_ps(sum[b]);
}

/* The compiler unrolls a fixed batch and keeps its sums in registers. */
static void avx512_bf16(const uint64_t *bitmap, const uint16_t *values, const int64_t *starts, const uint16_t *x,
                        float *y, int64_t rows, int64_t words, int batch, int64_t first, int64_t last) {
    int64_t half = batch == 1 ? (last - first) / 2 : 0;
    for (int64_t i = 0; i < half; i++) {
        int64_t r = first + i, s = first + half + i;
        avx512_pair_bf16(bitmap + r * words, bitmap + s * words, values + starts[r], values + starts[s], x, y + r, y + s,
                         words);
    }
#define ROWS(COUNT)                                                                                                \
    case COUNT:                                                                                                    \
        for (int64_t r = first + 2 * half; r < last; r++)                                                          \
            avx512_row_bf16(bitmap + r * words, values + starts[r], x, y + r, words, rows, COUNT);                 \
        break;
    switch (batch) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) }
}
#pragma GCC pop_options
#endif

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,fma,avx2,bmi,bmi2")
/* A dense row, for comparison: four streams of weights share each load of the activations. */
static void avx512_dense_bf16(const uint16_t *weight, const uint16_t *x, float *y, int64_t columns, int64_t first,
                              int64_t last) {
    int64_t quarter = (last - first) / 4;
    for (int64_t i = 0; i < quarter; i++) {
        const uint16_t *rows[4];
        __m512 sum[4];
        for (int j = 0; j < 4; j++) {
            rows[j] = weight + (first + i + j * quarter) * columns;
            sum[j] = _mm512_setzero_ps();
        }
        for (int64_t k = 0; k < columns; k += 32) {
            __m512bh at = ACTIVATIONS(x + k);
            for (int j = 0; j < 4; j++) sum[j] = _mm512_dpbf16_ps(sum[j], ACTIVATIONS(rows[j] + k), at);
        }
        for (int j = 0; j < 4; j++) y[first + i + j * quarter] = _mm512_reduce_add_ps(sum[j]);
    }
    for (int64_t r = first + 4 * quarter; r < last; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < columns; k += 32)
            sum = _mm512_dpbf16_ps(sum, ACTIVATIONS(weight + r * columns + k), ACTIVATIONS(x + k));
        y[r] = _mm512_reduce_add_ps(sum);
    }
}
#pragma GCC pop_options
#endif

/* Rows first..last of every thread; the shares differ by one row at most. */
#define EACH_THREAD(WORK)                                                                                          \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int t = 0; t < threads; t++) {          \
        int64_t first = rows * t / threads, last = rows * (t + 1) / threads;                                       \
        WORK                                                                                                       \
    }
#define EACH_ROW(ROUTINE)                                                                                          \
    EACH_THREAD(for (int64_t r = first; r < last; r++)                                                             \
                    ROUTINE(bitmap + r * words, values + starts[r], x, y + r, words, rows, batch);)

/* y [batch][rows] = x [batch][64 * words] Wᵀ for float values; 0, or 1 for a batch that is too large. */
int secateur_multiply_f32(int isa, const uint64_t *bitmap, const float *values, const int64_t *starts, const float *x,
                          float *y, int64_t rows, int64_t words, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
#ifdef X86
    if (isa == AVX512) {
        EACH_ROW(avx512_row_f32)
        return 0;
    }
    if (isa == AVX2) {
        EACH_ROW(avx2_f32)
        return 0;
    }
#endif
    EACH_ROW(portable_f32)
    return 0;
}

/* The same for bfloat16 values and activations; 2 where there is no memory for the widened activations. */
int secateur_multiply_bf16(int isa, const uint64_t *bitmap, const uint16_t *values, const int64_t *starts,
                           const uint16_t *activations, float *y, int64_t rows, int64_t words, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
#ifdef X86
    if (isa == AVX512) {
        EACH_THREAD(avx512_bf16(bitmap, values, starts, activations, y, rows, words, batch, first, last);)
        return 0;
    }
#endif
    float *x = malloc(sizeof(float) * 64 * words * batch);
    if (!x) return 2;
    for (int64_t i = 0; i < 64 * words * batch; i++) x[i] = widen(activations[i]);
#ifdef X86
    if (isa == AVX2) {
        EACH_ROW(avx2_bf16)
        free(x);
        return 0;
    }
#endif
    EACH_ROW(portable_bf16)
    free(x);
    return 0;
}

/* y [rows] = W x for a dense bfloat16 W [rows][columns], columns a multiple of 32: the fastest dense product that we
 * know for one row of activations, so that packed products are not compared with slow ones. 1 where it is missing. */
int secateur_dense_bf16(int isa, const uint16_t *weight, const uint16_t *x, float *y, int64_t rows, int64_t columns,
                        int threads) {
#ifdef X86
    if (isa == AVX512 && columns % 32 == 0) {
        EACH_THREAD(avx512_dense_bf16(weight, x, y, columns, first, last);)
        return 0;
    }
#endif
    (void)isa, (void)weight, (void)x, (void)y, (void)rows, (void)columns, (void)threads;
    return 1;
}

/* out [rows][64 * words] = the rows of a packed matrix from the first one that `bitmap` and `starts` point to, dense. */
#define UNPACK(NAME, TYPE, FAST)                                                                                   \
    void NAME(int isa, const uint64_t *bitmap, const TYPE *values, const int64_t *starts, TYPE *out, int64_t rows,  \
              int64_t words, int threads) {                                                                        \
        EACH_THREAD(for (int64_t r = first; r < last; r++) {                                                       \
            const TYPE *from = values + starts[r];                                                                 \
            TYPE *to = out + 64 * words * r;                                                                       \
            if (FAST(isa, bitmap + r * words, from, to, words)) continue;                                          \
            memset(to, 0, sizeof(TYPE) * 64 * words);                                                              \
            for (int64_t k = 0; k < words; k++)                                                                    \
                for (uint64_t left = bitmap[r * words + k]; left; left &= left - 1)                                \
                    to[64 * k + __builtin_ctzll(left)] = *from++;                                                  \
        })                                                                                                         \
    }

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt,bmi,bmi2")
static int expanded_bf16(int isa, const uint64_t *bitmap, const uint16_t *values, uint16_t *out, int64_t words) {
    if (isa != AVX512) return 0;
    for (int64_t k = 0; k < words; k++, out += 64) {
        uint64_t mask = bitmap[k];
        _mm512_storeu_si512(out, expand16((uint32_t)mask, values));
        _mm512_storeu_si512(out + 32, expand16(mask >> 32, values + _mm_popcnt_u32((uint32_t)mask)));
        values += _mm_popcnt_u64(mask);
    }
    return 1;
}

static int expanded_f32(int isa, const uint64_t *bitmap, const float *values, float *out, int64_t words) {
    if (isa != AVX512) return 0;
    for (int64_t k = 0; k < words; k++)
        for (uint64_t mask = bitmap[k], j = 0; j < 4; j++, mask >>= 16, out += 16) {
            _mm512_storeu_si512(out, expand32(mask & 0xffff, values));
            values += _mm_popcnt_u32(mask & 0xffff);
        }
    return 1;
}
#pragma GCC pop_options
#else
#define expanded_bf16(...) 0
#define expanded_f32(...) 0
#endif
UNPACK(secateur_unpack_bf16, uint16_t, expanded_bf16)
UNPACK(secateur_unpack_f32, float, expanded_f32)
