/* Dense products for one row of activations, the fastest that we know, so that packed ones are not compared with slow
 * ones: a ratio to these is the gain by zeros alone. y [rows] = W x, W [rows][columns]. */
#include "packed.h"

#ifdef X86
/* Four rows share each load of the activations; `last - first` need not be a multiple of four. */
#define FOUR_ROWS(NAME, TYPE, INPUT, SUM, ZERO, STEP, SEEN, ADD, TOTAL)                                            \
    static void NAME(const TYPE *weight, const INPUT *x, float *y, int64_t columns, int64_t first, int64_t last) { \
        int64_t quarter = (last - first) / 4;                                                                      \
        for (int64_t i = 0; i < quarter; i++) {                                                                    \
            const TYPE *rows[4];                                                                                   \
            SUM sum[4];                                                                                            \
            for (int j = 0; j < 4; j++) rows[j] = weight + (first + i + j * quarter) * columns, sum[j] = ZERO;     \
            for (int64_t k = 0; k < columns; k += STEP) {                                                          \
                SEEN;                                                                                              \
                for (int j = 0; j < 4; j++) ADD(sum[j], rows[j] + k);                                              \
            }                                                                                                      \
            for (int j = 0; j < 4; j++) y[first + i + j * quarter] = TOTAL(sum[j]);                                \
        }                                                                                                          \
        for (int64_t r = first + 4 * quarter; r < last; r++) {                                                     \
            SUM sum = ZERO;                                                                                        \
            for (int64_t k = 0; k < columns; k += STEP) {                                                          \
                SEEN;                                                                                              \
                ADD(sum, weight + r * columns + k);                                                                \
            }                                                                                                      \
            y[r] = TOTAL(sum);                                                                                     \
        }                                                                                                          \
    }

#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
#define WIDENED(p)                                                                                                 \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define ADD_BF16(sum, p) sum = _mm256_fmadd_ps(WIDENED(p), seen, sum)
#define ADD_I8(sum, p)                                                                                             \
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))), seen, sum)
FOUR_ROWS(avx2_bf16, uint16_t, float, __m256, _mm256_setzero_ps(), 8, __m256 seen = _mm256_loadu_ps(x + k), ADD_BF16,
          sum8)
FOUR_ROWS(avx2_i8, int8_t, float, __m256, _mm256_setzero_ps(), 8, __m256 seen = _mm256_loadu_ps(x + k), ADD_I8, sum8)
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
#define DOT_BF16(sum, p) sum = _mm512_dpbf16_ps(sum, BF16S(p), seen)
FOUR_ROWS(avx512_bf16_bf16, uint16_t, uint16_t, __m512, _mm512_setzero_ps(), 32, __m512bh seen = BF16S(x + k), DOT_BF16,
          _mm512_reduce_add_ps)
#pragma GCC pop_options

#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,avx2,bmi,bmi2")
#endif
/* Even and odd activations apart, as `widened` gives them. */
#define ADD_PAIRS(sum, p)                                                                                          \
    do {                                                                                                           \
        __m512i pairs = _mm512_loadu_si512(p);                                                                     \
        _mm_prefetch((const char *)(p) + 2048, _MM_HINT_T0);                                                       \
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), even, sum);                       \
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))), odd, sum); \
    } while (0)
FOUR_ROWS(avx512_bf16, uint16_t, float, __m512, _mm512_setzero_ps(), 32,
          __m512 even = _mm512_loadu_ps(x + k);
          __m512 odd = _mm512_loadu_ps(x + k + 16), ADD_PAIRS, _mm512_reduce_add_ps)

/* High and low bytes of the activations as in packed.c. */
typedef struct {
    __m512i high, low, weights;
} Sums;
#define NO_SUMS ((Sums){_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()})
#define DOT_I8(sum, p)                                                                                             \
    do {                                                                                                           \
        __m512i weights = _mm512_loadu_si512(p);                                                                   \
        _mm_prefetch((const char *)(p) + 2048, _MM_HINT_T0);                                                       \
        (sum).high = _mm512_dpbusd_epi32((sum).high, _mm512_loadu_si512(x + k), weights);                          \
        (sum).low = _mm512_dpbusd_epi32((sum).low, _mm512_loadu_si512(x + columns + k), weights);                  \
        (sum).weights = _mm512_dpbusd_epi32((sum).weights, _mm512_set1_epi8(1), weights);                          \
    } while (0)
static inline float total(Sums sum) {
    return (float)(256 * (int64_t)_mm512_reduce_add_epi32(sum.high) + _mm512_reduce_add_epi32(sum.low) -
                   32768 * (int64_t)_mm512_reduce_add_epi32(sum.weights));
}
FOUR_ROWS(avx512_i8, int8_t, uint8_t, Sums, NO_SUMS, 64, (void)0, DOT_I8, total)
#pragma GCC pop_options
#endif

/* bfloat16 weights and activations; 1 where this machine or the shape has no such product, 2 without memory. */
int secateur_dense_bf16(int isa, const uint16_t *weight, const uint16_t *x, float *y, int64_t rows, int64_t columns,
                        int threads) {
#ifdef X86
    if (isa == AVX512_BF16 && columns % 32 == 0) {
        EACH_THREAD(avx512_bf16_bf16(weight, x, y, columns, first, last);)
        return 0;
    }
    if ((isa == AVX512 && columns % 32 == 0) || (isa == AVX2 && columns % 8 == 0)) {
        float *wide = widened(isa, x, columns);
        if (!wide) return 2;
        EACH_THREAD((isa == AVX512 ? avx512_bf16 : avx2_bf16)(weight, wide, y, columns, first, last);)
        free(wide);
        return 0;
    }
#endif
    (void)isa, (void)weight, (void)x, (void)y, (void)rows, (void)columns, (void)threads;
    return 1;
}

/* int8 weights, each row with its own scale, and float activations. */
int secateur_dense_i8(int isa, const int8_t *weight, const float *scales, const float *x, float *y, int64_t rows,
                      int64_t columns, int threads) {
#ifdef X86
    float step = 1;
    if (isa >= AVX512 && columns % 64 == 0) {
        uint8_t *bytes = malloc(2 * columns);
        if (!bytes) return 2;
        as_bytes(x, bytes, columns, &step);
        EACH_THREAD(avx512_i8(weight, bytes, y, columns, first, last);)
        free(bytes);
    } else if (isa == AVX2 && columns % 8 == 0) {
        EACH_THREAD(avx2_i8(weight, x, y, columns, first, last);)
    } else
        return 1;
    for (int64_t r = 0; r < rows; r++) y[r] *= step * scales[r];
    return 0;
#else
    (void)isa, (void)weight, (void)scales, (void)x, (void)y, (void)rows, (void)columns, (void)threads;
    return 1;
#endif
}
