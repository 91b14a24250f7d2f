/* What packed.c, packed_levels.c and dense.c share: batches, activations as bytes, sums over a vector. */
#ifndef SECATEUR_PACKED_H
#define SECATEUR_PACKED_H
#include "native.h"

#ifdef EMULATED
#include "emulated.h"
#elif defined(X86)
#include <immintrin.h>
#endif

enum { MOST = 8 }; /* rows of x at once */

/* A case for each batch, so that the compiler unrolls it and keeps its sums in registers. */
#define EACH_BATCH(DO, WITH)                                                                                           \
    switch (batch) {                                                                                               \
        case 1: DO(WITH, 1) break;                                                                                       \
        case 2: DO(WITH, 2) break;                                                                                       \
        case 3: DO(WITH, 3) break;                                                                                       \
        case 4: DO(WITH, 4) break;                                                                                       \
        case 5: DO(WITH, 5) break;                                                                                       \
        case 6: DO(WITH, 6) break;                                                                                       \
        case 7: DO(WITH, 7) break;                                                                                       \
        case 8: DO(WITH, 8) break;                                                                                       \
    }

static inline float widen(uint16_t bits) { /* bfloat16 is the upper half of a float */
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* bfloat16 activations as floats, NULL without memory; for AVX-512 without dot products of bfloat16 the even ones of every
 * 32 come first, then the odd ones, as their weights do in words of 32 bits. `count` is a multiple of 32 there. */
static inline float *widened(int isa, const uint16_t *x, int64_t count) {
    float *wide = malloc(sizeof(float) * count);
    if (!wide) return wide;
    if (isa == AVX512) {
        for (int64_t k = 0; k < count; k += 32)
            for (int j = 0; j < 16; j++)
                wide[k + j] = widen(x[k + 2 * j]), wide[k + 16 + j] = widen(x[k + 2 * j + 1]);
    } else
        for (int64_t k = 0; k < count; k++) wide[k] = widen(x[k]);
    return wide;
}

/* A row of activations as integers of 16 bits, x = step * (256 high + low - 32768): all high bytes, then all low. */
static inline void as_bytes(const float *x, uint8_t *bytes, int64_t columns, float *step) {
    float most = 0;
    for (int64_t k = 0; k < columns; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    *step = most / 32767;
    float each = most > 0 ? 32767 / most : 0;
    for (int64_t k = 0; k < columns; k++) {
        unsigned whole = (unsigned)(int)(x[k] * each + 32768.5f);
        bytes[k] = whole >> 8, bytes[columns + k] = whole & 255;
    }
}

#ifdef X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
INLINED float sum8(__m256 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#pragma GCC pop_options
#define BF16S(p) ((__m512bh)_mm512_loadu_si512(p))
#endif

#endif
