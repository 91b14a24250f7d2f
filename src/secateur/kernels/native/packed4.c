/* Products with a sparse matrix that stays packed and whose kept values have four bits: y = x Wᵀ for one to eight rows
 * of x.
 *
 * `bitmap` and x are as in packed.c. `values` holds two values a byte, the first in the lower half, each an integer of
 * -8..7; those of every word of 64 columns begin at a byte of their own, `starts[r]` says at which byte row r begins,
 * and 64 bytes after the last one may be read. Columns fall into `groups` of words / groups words, or all into one:
 * `scales` [rows][groups], bfloat16, are what a group's values are multiplied by.
 *
 * With AVX2 and AVX-512 activations are integers of 16 bits, x = step * (256 high + low - 32768): bytes without a sign,
 * whose products with values that have one are exact. The 32768 falls on all weights of a row alike: `sums` [rows] are
 * those of its weights.
 */
#include "packed.h"

typedef struct {
    const uint64_t *bitmap;
    const uint8_t *values;
    const int64_t *starts;
    const uint16_t *scales;
    int64_t rows, words, groups;
} Packed4;

static inline int value_of(const uint8_t *values, int at) { /* the one at a place among a word's */
    return (int8_t)(values[at / 2] << (at % 2 ? 0 : 4)) >> 4;
}
static inline int bytes_of(uint64_t mask) { return (__builtin_popcountll(mask) + 1) / 2; }

static void portable_i4(const Packed4 *w, const float *x, float *y, int batch, int64_t first, int64_t last) {
    int64_t words = w->words, each = words / w->groups;
    for (int64_t r = first; r < last; r++) {
        const uint8_t *from = w->values + w->starts[r];
        float sum[MOST] = {0};
        for (int64_t k = 0; k < words; k++) {
            float scale = widen(w->scales[r * w->groups + k / each]);
            uint64_t mask = w->bitmap[r * words + k];
            int at = 0;
            for (uint64_t left = mask; left; left &= left - 1) {
                const float *seen = x + 64 * k + __builtin_ctzll(left);
                float value = scale * value_of(from, at++);
                for (int b = 0; b < batch; b++) sum[b] += value * seen[b * 64 * words];
            }
            from += bytes_of(mask);
        }
        for (int b = 0; b < batch; b++) y[r + b * w->rows] = sum[b];
    }
}

#ifdef X86
enum { TOGETHER = 4 }; /* rows at once, at most */

/* What a routine for `count` rows takes, `apart` from one another; whose groups have two words, if `pairs`. */
#define ROWS_OF4 const Packed4 *w, const uint8_t *x, float *y, int64_t row, int64_t apart, const int count, \
    const int batch, const int pairs

#define BEGIN_ROWS4                                                                                                \
    int64_t words = w->words, each = pairs ? 2 : words / w->groups;                                                \
    const uint64_t *masks[TOGETHER];                                                                               \
    const uint8_t *from[TOGETHER];                                                                                 \
    const uint16_t *scales[TOGETHER];                                                                              \
    for (int i = 0; i < count; i++) {                                                                              \
        int64_t r = row + i * apart;                                                                               \
        masks[i] = w->bitmap + r * words;                                                                          \
        from[i] = w->values + w->starts[r];                                                                        \
        scales[i] = w->scales + r * w->groups;                                                                     \
    }

/* A thread's share: four rows at a time where their sums fit the registers, else two; the last ones alone. */
#define SHARE4(NAME, ROUTINE)                                                                                      \
    static void NAME(const Packed4 *w, const uint8_t *x, float *y, int batch, int64_t first, int64_t last) {       \
        EACH_BATCH(GROUPS4, ROUTINE)                                                                               \
    }
#define GROUPS4(ROUTINE, BATCH)                                                                                    \
    {                                                                                                              \
        if (w->words == 2 * w->groups) ROWS4(ROUTINE, BATCH, 1) else ROWS4(ROUTINE, BATCH, 0)                      \
    }
#define ROWS4(ROUTINE, BATCH, PAIRS)                                                                               \
    {                                                                                                              \
        int64_t count = BATCH < 3 ? 4 : 2, apart = (last - first) / count, r = first;                              \
        for (; r < first + apart; r++) ROUTINE(w, x, y, r, apart, BATCH < 3 ? 4 : 2, BATCH, PAIRS);                \
        for (r += (count - 1) * apart; r < last; r++) ROUTINE(w, x, y, r, 0, 1, BATCH, PAIRS);                     \
    }
/* Registers hold the sums of four activations at most; a larger batch takes two turns at the same rows. */
#define TWICE4(NAME)                                                                                               \
    INLINED void NAME##_twice(ROWS_OF4) {                                                                          \
        NAME(w, x, y, row, apart, count, batch > 4 ? 4 : batch, pairs);                                            \
        if (batch > 4)                                                                                             \
            NAME(w, x + 8 * 64 * w->words, y + 4 * w->rows, row, apart, count, batch - 4, pairs);                  \
    }

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
/* The values of 16 columns in halves of bytes, zeros between: two deposits of bits. */
INLINED uint64_t spread_i4(const uint8_t *values, unsigned at, unsigned mask) {
    uint64_t places = 15 * __builtin_ia32_pdep_di(mask, 0x1111111111111111), some;
    memcpy(&some, values + at / 2, 8);
    some >>= 4 * (at % 2);
    if (mask == 0xffff && at % 2) some |= (uint64_t)values[at / 2 + 8] << 60;
    return __builtin_ia32_pdep_di(some, places);
}

INLINED __m256i spread_word(const uint8_t *values, uint64_t mask) {
    uint64_t four[4];
    unsigned at = 0;
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        unsigned part = mask >> 16 * j & 0xffff;
        four[j] = spread_i4(values, at, part);
        at += __builtin_popcount(part);
    }
    return _mm256_set_epi64x(four[3], four[2], four[1], four[0]);
}

/* x: of every word the high bytes of even columns, of odd ones, then the low bytes (`in_halves`). Sums of 16 bits hold
 * the products of four words. */
INLINED void avx2_rows_i4(ROWS_OF4) {
    BEGIN_ROWS4
    const __m256i half = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), more = _mm256_set1_epi16(256);
    const __m256i signs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    __m256 sum[TOGETHER][MOST];
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) sum[i][b] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w->groups; g++)
        for (int64_t begin = g * each; begin < (g + 1) * each; begin += 4) {
            int64_t left = (g + 1) * each - begin, end = begin + (pairs ? 2 : left < 4 ? left : 4);
            __m256i high[TOGETHER][MOST], low[TOGETHER][MOST];
            for (int i = 0; i < count; i++)
                for (int b = 0; b < batch; b++) high[i][b] = low[i][b] = _mm256_setzero_si256();
            for (int64_t k = begin; k < end; k++)
                for (int i = 0; i < count; i++) {
                    __m256i both = spread_word(from[i], masks[i][k]);
                    __m256i even = _mm256_shuffle_epi8(signs, _mm256_and_si256(both, half));
                    __m256i odd = _mm256_shuffle_epi8(signs, _mm256_and_si256(_mm256_srli_epi16(both, 4), half));
                    from[i] += bytes_of(masks[i][k]);
                    for (int b = 0; b < batch; b++) {
                        const __m256i *at = (const __m256i *)(x + 128 * (k + b * words));
#define PRODUCT(j, weight) _mm256_maddubs_epi16(_mm256_loadu_si256(at + j), weight)
                        high[i][b] = _mm256_add_epi16(high[i][b], _mm256_add_epi16(PRODUCT(0, even), PRODUCT(1, odd)));
                        low[i][b] = _mm256_add_epi16(low[i][b], _mm256_add_epi16(PRODUCT(2, even), PRODUCT(3, odd)));
#undef PRODUCT
                    }
                }
            for (int i = 0; i < count; i++) {
                __m256 scale = _mm256_set1_ps(widen(scales[i][g]));
                for (int b = 0; b < batch; b++) {
                    __m256i whole = _mm256_add_epi32(_mm256_madd_epi16(high[i][b], more), _mm256_madd_epi16(low[i][b], one));
                    sum[i][b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, sum[i][b]);
                }
            }
        }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) y[row + i * apart + b * w->rows] = sum8(sum[i][b]);
}
TWICE4(avx2_rows_i4)
SHARE4(avx2_i4, avx2_rows_i4_twice)
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
#ifndef EMULATED
static inline __m512i expand_bytes(uint64_t mask, __m512i bytes) { /* for Zen 4, as packed.c says */
    __m512i placed;
    __asm__("vpxor %x0,%x0,%x0\n\tvpexpandb %2,%0%{%1%}" : "=&x"(placed) : "Yk"((__mmask64)mask), "v"(bytes));
    return placed;
}
#endif

/* The values of a word in the upper halves of bytes, zeros between: 16 times each weight. Every four bytes become
 * eight; what is there of a neighbour in the lower half is cleared last. */
INLINED __m512i expand4(uint64_t mask, const uint8_t *values) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0), places = _mm512_set1_epi64(0x1814100c0804003c);
    __m512i fours = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)values));
    __m512i bytes = _mm512_multishift_epi64_epi8(places, fours);
    return _mm512_and_si512(expand_bytes(mask, bytes), upper);
}

/* Sums of 32 bits hold the products of 32 words: of a byte with a sign and one without, 16 times and 256 times. */
INLINED void avx512_rows_i4(ROWS_OF4) {
    BEGIN_ROWS4
    __m512 sum[TOGETHER][MOST];
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++) sum[i][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w->groups; g++)
        for (int64_t begin = g * each; begin < (g + 1) * each; begin += 32) {
            int64_t left = (g + 1) * each - begin, end = begin + (pairs ? 2 : left < 32 ? left : 32);
            __m512i high[TOGETHER][MOST], low[TOGETHER][MOST];
            for (int i = 0; i < count; i++)
                for (int b = 0; b < batch; b++) high[i][b] = low[i][b] = _mm512_setzero_si512();
            _Pragma("GCC unroll 2") for (int64_t k = begin; k < end; k++) {
                __m512i weight[TOGETHER];
                for (int i = 0; i < count; i++) {
                    uint64_t mask = masks[i][k];
                    _mm_prefetch((const char *)from[i] + 1024, _MM_HINT_T0);
                    weight[i] = expand4(mask, from[i]);
                    from[i] += bytes_of(mask);
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
            for (int i = 0; i < count; i++) {
                __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(scales[i][g]), 16));
                for (int b = 0; b < batch; b++) {
                    __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[i][b], 8), low[i][b]);
                    sum[i][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sum[i][b]);
                }
            }
        }
    for (int i = 0; i < count; i++)
        for (int b = 0; b < batch; b++)
            y[row + i * apart + b * w->rows] = 0x1p-4f * _mm512_reduce_add_ps(sum[i][b]);
}
TWICE4(avx512_rows_i4)
SHARE4(avx512_i4, avx512_rows_i4_twice)
#pragma GCC pop_options

/* A row of bytes as AVX2 wants it: of every word the even and the odd columns' high bytes, then their low ones. */
static void in_halves(const uint8_t *bytes, uint8_t *out, int64_t columns) {
    for (int64_t k = 0; k < columns; k += 64, out += 128)
        for (int j = 0; j < 32; j++)
            for (int odd = 0; odd < 2; odd++) {
                out[32 * odd + j] = bytes[k + 2 * j + odd];
                out[64 + 32 * odd + j] = bytes[columns + k + 2 * j + odd];
            }
}

#endif

/* Deposits of bits take a step for each bit on the first two generations of Zen: there plain C is used. */
static int settled(int isa) {
#if defined(X86) && !defined(EMULATED)
    __builtin_cpu_init();
    if (isa == AVX2 && (__builtin_cpu_is("znver1") || __builtin_cpu_is("znver2"))) return PORTABLE;
#endif
    return isa;
}

/* sums [rows] = the weights of each row, added up. */
void secateur_sums_i4(const uint64_t *bitmap, const uint8_t *values, const int64_t *starts, const uint16_t *scales,
                      float *sums, int64_t rows, int64_t words, int64_t groups, int threads) {
    EACH_THREAD(for (int64_t r = first; r < last; r++) {
        const uint8_t *from = values + starts[r];
        double sum = 0;
        for (int64_t k = 0; k < words; k++) {
            int whole = 0, count = __builtin_popcountll(bitmap[r * words + k]);
            for (int at = 0; at < count; at++) whole += value_of(from, at);
            sum += (double)widen(scales[r * groups + k / (words / groups)]) * whole;
            from += (count + 1) / 2;
        }
        sums[r] = sum;
    })
}

/* y [batch][rows] = x [batch][64 * words] Wᵀ; 0, 1 for a batch that is too large, 2 without memory. AVX2 and AVX-512
 * round x, by 2^-16 of the largest one of its row at most. */
int secateur_multiply_i4(int isa, const uint64_t *bitmap, const uint8_t *values, const int64_t *starts,
                         const uint16_t *scales, const float *sums, const float *x, float *y, int64_t rows,
                         int64_t words, int64_t groups, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
    const Packed4 w = {bitmap, values, starts, scales, rows, words, groups};
#ifdef X86
    if ((isa = settled(isa)) != PORTABLE) {
        int64_t columns = 64 * words, size = 2 * columns;
        uint8_t *bytes = malloc(size * (batch + 1));
        float steps[MOST];
        if (!bytes) return 2;
        for (int b = 0; b < batch; b++) {
            uint8_t *at = bytes + b * size, *plain = isa == AVX2 ? bytes + batch * size : at;
            as_bytes(x + b * columns, plain, columns, steps + b);
            if (isa == AVX2) in_halves(plain, at, columns);
        }
        EACH_THREAD((isa == AVX2 ? avx2_i4 : avx512_i4)(&w, bytes, y, batch, first, last);
                    for (int b = 0; b < batch; b++)
                        for (int64_t r = first; r < last; r++)
                            y[b * rows + r] = steps[b] * (y[b * rows + r] - 32768 * sums[r]);)
        free(bytes);
        return 0;
    }
#endif
    (void)isa, (void)sums;
    EACH_THREAD(portable_i4(&w, x, y, batch, first, last);)
    return 0;
}

/* out [64 * words] = a row, dense, in floats: a value times its group's scale. */
static void portable_widen_i4(const uint64_t *bitmap, const uint8_t *values, const uint16_t *scales, float *out,
                              int64_t words, int64_t each) {
    memset(out, 0, sizeof(float) * 64 * words);
    for (int64_t k = 0; k < words; k++) {
        float scale = widen(scales[k / each]);
        int at = 0;
        for (uint64_t left = bitmap[k]; left; left &= left - 1)
            out[64 * k + __builtin_ctzll(left)] = scale * value_of(values, at++);
        values += bytes_of(bitmap[k]);
    }
}

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
static void avx2_widen_i4(const uint64_t *bitmap, const uint8_t *values, const uint16_t *scales, float *out,
                          int64_t words, int64_t each) {
    for (int64_t k = 0; k < words; k++) {
        __m256 scale = _mm256_set1_ps(widen(scales[k / each]));
        unsigned at = 0;
        for (int j = 0; j < 4; j++, out += 16) {
            unsigned part = bitmap[k] >> 16 * j & 0xffff;
            uint64_t spread = spread_i4(values, at, part);
            at += __builtin_popcount(part);
            for (int half = 0; half < 2; half++, spread >>= 32) {
                const __m256i upwards = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
                __m256i eight = _mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32((int)spread), upwards), 28);
                _mm256_storeu_ps(out + 8 * half, _mm256_mul_ps(_mm256_cvtepi32_ps(eight), scale));
            }
        }
        values += bytes_of(bitmap[k]);
    }
}
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
static void avx512_widen_i4(const uint64_t *bitmap, const uint8_t *values, const uint16_t *scales, float *out,
                            int64_t words, int64_t each) {
    for (int64_t k = 0; k < words; k++) {
        __m512 scale = _mm512_set1_ps(widen(scales[k / each]));
        int8_t bytes[64];
        _mm512_storeu_si512(bytes, expand4(bitmap[k], values));
        for (int j = 0; j < 64; j += 16, out += 16) {
            __m512i sixteen = _mm512_srai_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(bytes + j))), 4);
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(sixteen), scale));
        }
        values += bytes_of(bitmap[k]);
    }
}
#pragma GCC pop_options
#endif

/* out [rows][64 * words] = the rows from the first one that the others point to, dense. */
void secateur_widen_i4(int isa, const uint64_t *bitmap, const uint8_t *values, const int64_t *starts,
                       const uint16_t *scales, float *out, int64_t rows, int64_t words, int64_t groups, int threads) {
    void (*row)(const uint64_t *, const uint8_t *, const uint16_t *, float *, int64_t, int64_t) =
        FASTEST(settled(isa), widen_i4);
    EACH_THREAD(for (int64_t r = first; r < last; r++)
                    row(bitmap + r * words, values + starts[r], scales + r * groups, out + 64 * words * r, words,
                        words / groups);)
}
