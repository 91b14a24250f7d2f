/* Products with a sparse matrix that stays packed and whose kept values have four, three or two bits: y = x Wᵀ for one to
 * eight rows of x.
 *
 * `bitmap` and x are as in packed.c. `values` are integers of `bits` bits with a sign, side by side from the lowest bit
 * of a byte on; those of every word of 64 columns begin at a byte of their own, `starts[r]` says at which byte row r
 * begins, and 64 bytes after the last one may be read. Columns fall into `groups` of words / groups words, or all into
 * one: `scales` [rows][groups], bfloat16, are what a group's values are multiplied by.
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
    int bits;
    uint8_t bytes[64], shifts[8]; /* of eight columns: the bytes that hold their values, the bits of those that are one */
} PackedLevels;

static PackedLevels levels_of(const uint64_t *bitmap, const uint8_t *values, const int64_t *starts,
                              const uint16_t *scales, int64_t rows, int64_t words, int64_t groups, int bits) {
    PackedLevels w = {bitmap, values, starts, scales, rows, words, groups, bits, {0}, {0}};
    for (int at = 0; at < 64; at++) w.bytes[at] = at / 8 * bits + at % 4;
    for (int at = 0; at < 8; at++) w.shifts[at] = ((at + 1) * bits - 8) & 63; /* it comes to the upper end of a byte */
    return w;
}

static inline int value_of(const uint8_t *values, int at, int bits) { /* the one at a place among a word's */
    uint32_t two = values[at * bits / 8] | values[at * bits / 8 + 1] << 8;
    return (int32_t)(two >> at * bits % 8 << (32 - bits)) >> (32 - bits);
}
static inline int bytes_of(uint64_t mask, int bits) { return (__builtin_popcountll(mask) * bits + 7) / 8; }

static void portable_levels(const PackedLevels *w, const float *x, float *y, int batch, int64_t first, int64_t last) {
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
                float value = scale * value_of(from, at++, w->bits);
                for (int b = 0; b < batch; b++) sum[b] += value * seen[b * 64 * words];
            }
            from += bytes_of(mask, w->bits);
        }
        for (int b = 0; b < batch; b++) y[r + b * w->rows] = sum[b];
    }
}

#ifdef X86
enum { TOGETHER = 4 }; /* rows at once, at most */

/* What a routine for `count` rows takes, `apart` from one another; whose groups have two words, if `pairs`. Four bits are
 * what the compiler knows, fewer what it is told. */
#define ROWS_OF_LEVELS const PackedLevels *w, const uint8_t *x, float *y, int64_t row, int64_t apart, const int count, \
    const int batch, const int pairs, const int bits

#define BEGIN_ROWS                                                                                                     \
    int64_t words = w->words, each = pairs ? 2 : words / w->groups;                                                    \
    const uint64_t *masks[TOGETHER];                                                                                   \
    const uint8_t *from[TOGETHER];                                                                                     \
    const uint16_t *scales[TOGETHER];                                                                                  \
    for (int i = 0; i < count; i++) {                                                                                  \
        int64_t r = row + i * apart;                                                                                   \
        masks[i] = w->bitmap + r * words;                                                                              \
        from[i] = w->values + w->starts[r];                                                                            \
        scales[i] = w->scales + r * w->groups;                                                                         \
    }

/* A thread's share: four rows at a time where their sums fit the registers, else two; the last ones alone. */
#define SHARE(NAME, ROUTINE)                                                                                           \
    static void NAME(const PackedLevels *w, const uint8_t *x, float *y, int batch, int64_t first, int64_t last) {      \
        EACH_BATCH(EACH_GROUP, ROUTINE)                                                                                \
    }
#define EACH_GROUP(ROUTINE, BATCH)                                                                                     \
    {                                                                                                                  \
        if (w->bits < 4) EACH_ROW(ROUTINE, BATCH, 0, w->bits)                                                          \
        else if (w->words == 2 * w->groups) EACH_ROW(ROUTINE, BATCH, 1, 4)                                             \
        else EACH_ROW(ROUTINE, BATCH, 0, 4)                                                                            \
    }
#define EACH_ROW(ROUTINE, BATCH, PAIRS, BITS)                                                                          \
    {                                                                                                                  \
        int64_t count = BATCH < 3 ? 4 : 2, apart = (last - first) / count, r = first;                                  \
        for (; r < first + apart; r++) ROUTINE(w, x, y, r, apart, BATCH < 3 ? 4 : 2, BATCH, PAIRS, BITS);              \
        for (r += (count - 1) * apart; r < last; r++) ROUTINE(w, x, y, r, 0, 1, BATCH, PAIRS, BITS);                   \
    }
/* Registers hold the sums of four activations at most; a larger batch takes two turns at the same rows. */
#define TWICE(NAME)                                                                                                    \
    INLINED void NAME##_twice(ROWS_OF_LEVELS) {                                                                        \
        NAME(w, x, y, row, apart, count, batch > 4 ? 4 : batch, pairs, bits);                                          \
        if (batch > 4)                                                                                                 \
            NAME(w, x + 8 * 64 * w->words, y + 4 * w->rows, row, apart, count, batch - 4, pairs, bits);                \
    }

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
/* The values of 16 columns in halves of bytes, zeros between: two deposits of bits. */
INLINED uint64_t spread_levels(const uint8_t *values, unsigned at, unsigned mask, int bits) {
    uint64_t places = ((1ull << bits) - 1) * __builtin_ia32_pdep_di(mask, 0x1111111111111111), some;
    memcpy(&some, values + at * bits / 8, 8);
    some >>= at * bits % 8;
    if (bits == 4 && mask == 0xffff && at % 2) some |= (uint64_t)values[at / 2 + 8] << 60;
    return __builtin_ia32_pdep_di(some, places);
}

INLINED __m256i spread_word(const uint8_t *values, uint64_t mask, int bits) {
    uint64_t four[4];
    unsigned at = 0;
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        unsigned part = mask >> 16 * j & 0xffff;
        four[j] = spread_levels(values, at, part, bits);
        at += __builtin_popcount(part);
    }
    return _mm256_set_epi64x(four[3], four[2], four[1], four[0]);
}

/* What a value in a half of a byte stands for: that of its highest bit is negative. */
INLINED __m256i signs_of(int bits) {
    const __m128i each = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i above = _mm_cmpgt_epi8(each, _mm_set1_epi8((1 << bits) / 2 - 1));
    return _mm256_broadcastsi128_si256(_mm_sub_epi8(each, _mm_and_si128(above, _mm_set1_epi8(1 << bits))));
}

/* x: of every word the high bytes of even columns, of odd ones, then the low bytes (`in_halves`). Sums of 16 bits hold
 * the products of four words. */
INLINED void avx2_rows_levels(ROWS_OF_LEVELS) {
    BEGIN_ROWS
    const __m256i half = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), more = _mm256_set1_epi16(256);
    const __m256i signs = signs_of(bits);
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
                    __m256i both = spread_word(from[i], masks[i][k], bits);
                    __m256i even = _mm256_shuffle_epi8(signs, _mm256_and_si256(both, half));
                    __m256i odd = _mm256_shuffle_epi8(signs, _mm256_and_si256(_mm256_srli_epi16(both, 4), half));
                    from[i] += bytes_of(masks[i][k], bits);
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
TWICE(avx2_rows_levels)
SHARE(avx2_levels, avx2_rows_levels_twice)
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

typedef struct {
    __m512i bytes, shifts, upper;
} Placing;

INLINED Placing placing_of(const PackedLevels *w) {
    int64_t shifts;
    memcpy(&shifts, w->shifts, 8);
    __m512i upper = _mm512_set1_epi8((char)(0xff << (8 - w->bits)));
    return (Placing){_mm512_loadu_si512(w->bytes), _mm512_set1_epi64(shifts), upper};
}

/* The values of a word in the upper bits of bytes, zeros between: 16, 32 or 64 times each weight. */
INLINED __m512i expand_levels(uint64_t mask, const uint8_t *values, Placing placing) {
    __m512i some = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)values));
    __m512i bytes = _mm512_multishift_epi64_epi8(placing.shifts, _mm512_permutexvar_epi8(placing.bytes, some));
    return _mm512_and_si512(expand_bytes(mask, bytes), placing.upper);
}

/* Sums of 32 bits hold the products of 32 words: of a byte with a sign and one without, 16 times and 256 times. */
INLINED void avx512_rows_levels(ROWS_OF_LEVELS) {
    BEGIN_ROWS
    const Placing placing = placing_of(w);
    const float times = 1.0f / (1 << (8 - bits));
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
                    weight[i] = expand_levels(mask, from[i], placing);
                    from[i] += bytes_of(mask, bits);
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
            y[row + i * apart + b * w->rows] = times * _mm512_reduce_add_ps(sum[i][b]);
}
TWICE(avx512_rows_levels)
SHARE(avx512_levels, avx512_rows_levels_twice)
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
void secateur_sums_levels(const uint64_t *bitmap, const uint8_t *values, const int64_t *starts, const uint16_t *scales,
                          float *sums, int64_t rows, int64_t words, int64_t groups, int bits, int threads) {
    EACH_THREAD(for (int64_t r = first; r < last; r++) {
        const uint8_t *from = values + starts[r];
        double sum = 0;
        for (int64_t k = 0; k < words; k++) {
            int whole = 0, count = __builtin_popcountll(bitmap[r * words + k]);
            for (int at = 0; at < count; at++) whole += value_of(from, at, bits);
            sum += (double)widen(scales[r * groups + k / (words / groups)]) * whole;
            from += (count * bits + 7) / 8;
        }
        sums[r] = sum;
    })
}

/* y [batch][rows] = x [batch][64 * words] Wᵀ; 0, 1 for a batch that is too large, 2 without memory. AVX2 and AVX-512
 * round x, by 2^-16 of the largest one of its row at most. */
int secateur_multiply_levels(int isa, const uint64_t *bitmap, const uint8_t *values, const int64_t *starts,
                             const uint16_t *scales, const float *sums, const float *x, float *y, int64_t rows,
                             int64_t words, int64_t groups, int bits, int batch, int threads) {
    if (batch < 1 || batch > MOST) return 1;
    const PackedLevels w = levels_of(bitmap, values, starts, scales, rows, words, groups, bits);
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
        EACH_THREAD((isa == AVX2 ? avx2_levels : avx512_levels)(&w, bytes, y, batch, first, last);
                    for (int b = 0; b < batch; b++)
                        for (int64_t r = first; r < last; r++)
                            y[b * rows + r] = steps[b] * (y[b * rows + r] - 32768 * sums[r]);)
        free(bytes);
        return 0;
    }
#endif
    (void)isa, (void)sums;
    EACH_THREAD(portable_levels(&w, x, y, batch, first, last);)
    return 0;
}

#define BEGIN_ROW                                                                                                      \
    int64_t words = w->words, each = words / w->groups;                                                                \
    const uint64_t *bitmap = w->bitmap + row * words;                                                                  \
    const uint8_t *values = w->values + w->starts[row];                                                                \
    const uint16_t *scales = w->scales + row * w->groups;

/* out [64 * words] = a row, dense, in floats: a value times its group's scale. */
static void portable_widen_levels(const PackedLevels *w, int64_t row, float *out) {
    BEGIN_ROW
    const int bits = w->bits;
    memset(out, 0, sizeof(float) * 64 * words);
    for (int64_t k = 0; k < words; k++) {
        float scale = widen(scales[k / each]);
        int at = 0;
        for (uint64_t left = bitmap[k]; left; left &= left - 1)
            out[64 * k + __builtin_ctzll(left)] = scale * value_of(values, at++, bits);
        values += bytes_of(bitmap[k], bits);
    }
}

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
INLINED void avx2_widen_row(const PackedLevels *w, int64_t row, float *out, const int bits) {
    BEGIN_ROW
    for (int64_t k = 0; k < words; k++) {
        __m256 scale = _mm256_set1_ps(widen(scales[k / each]));
        unsigned at = 0;
        for (int j = 0; j < 4; j++, out += 16) {
            unsigned part = bitmap[k] >> 16 * j & 0xffff;
            uint64_t spread = spread_levels(values, at, part, bits);
            at += __builtin_popcount(part);
            for (int half = 0; half < 2; half++, spread >>= 32) {
                const __m256i upwards = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
                __m256i eight = _mm256_sllv_epi32(_mm256_set1_epi32((int)spread), upwards); /* bits of others above */
                eight = _mm256_srai_epi32(_mm256_slli_epi32(eight, 4 - bits), 32 - bits);
                _mm256_storeu_ps(out + 8 * half, _mm256_mul_ps(_mm256_cvtepi32_ps(eight), scale));
            }
        }
        values += bytes_of(bitmap[k], bits);
    }
}
static void avx2_widen_levels(const PackedLevels *w, int64_t row, float *out) {
    if (w->bits == 4) avx2_widen_row(w, row, out, 4);
    else avx2_widen_row(w, row, out, w->bits);
}
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
static void avx512_widen_levels(const PackedLevels *w, int64_t row, float *out) {
    BEGIN_ROW
    const int bits = w->bits;
    const Placing placing = placing_of(w);
    for (int64_t k = 0; k < words; k++) {
        __m512 scale = _mm512_set1_ps(widen(scales[k / each]));
        int8_t bytes[64];
        _mm512_storeu_si512(bytes, expand_levels(bitmap[k], values, placing));
        for (int j = 0; j < 64; j += 16, out += 16) {
            __m512i sixteen = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(bytes + j)));
            sixteen = _mm512_sra_epi32(sixteen, _mm_cvtsi32_si128(8 - bits));
            _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(sixteen), scale));
        }
        values += bytes_of(bitmap[k], bits);
    }
}
#pragma GCC pop_options
#endif

/* out [rows][64 * words] = the rows from the first one that the others point to, dense. */
void secateur_widen_levels(int isa, const uint64_t *bitmap, const uint8_t *values, const int64_t *starts,
                           const uint16_t *scales, float *out, int64_t rows, int64_t words, int64_t groups, int bits,
                           int threads) {
    const PackedLevels w = levels_of(bitmap, values, starts, scales, rows, words, groups, bits);
    void (*widen_row)(const PackedLevels *, int64_t, float *) = FASTEST(settled(isa), widen_levels);
    EACH_THREAD(for (int64_t r = first; r < last; r++) widen_row(&w, r, out + 64 * words * r);)
}
