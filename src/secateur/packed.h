/* What packed.c and dense.c share: the instruction sets, and how rows are given to threads. */
#ifndef SECATEUR_PACKED_H
#define SECATEUR_PACKED_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef EMULATED /* AVX-512 on a machine that has none: make sanitize */
#include "emulated.h"
#define X86 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 }; /* AVX512: with VBMI2 (expand 8 and 16 bits), BF16 and VNNI (dot products) */
enum { MOST = 8 };                           /* rows of x at once */

#define INLINED static inline __attribute__((always_inline))

/* Rows first..last of every thread; the shares differ by one row at most. */
#define EACH_THREAD(WORK)                                                                                          \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int t = 0; t < threads; t++) {          \
        int64_t first = rows * t / threads, last = rows * (t + 1) / threads;                                       \
        WORK                                                                                                       \
    }

/* A case for each batch, so that the compiler unrolls it and keeps its sums in registers. */
#define EACH_BATCH(DO)                                                                                             \
    switch (batch) {                                                                                               \
        case 1: DO(1) break;                                                                                       \
        case 2: DO(2) break;                                                                                       \
        case 3: DO(3) break;                                                                                       \
        case 4: DO(4) break;                                                                                       \
        case 5: DO(5) break;                                                                                       \
        case 6: DO(6) break;                                                                                       \
        case 7: DO(7) break;                                                                                       \
        case 8: DO(8) break;                                                                                       \
    }

static inline float widen(uint16_t bits) { /* bfloat16 is the upper half of a float */
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* A row of activations as integers of 16 bits, x = step * (256 high + low - 32768): all high bytes, then all low. */
static inline void secateur_bytes(const float *x, uint8_t *bytes, int64_t columns, float *step) {
    float most = 0;
    for (int64_t k = 0; k < columns; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    *step = most / 32767;
    float each = most > 0 ? 32767 / most : 0;
    for (int64_t k = 0; k < columns; k++) {
        unsigned whole = (unsigned)(int)(x[k] * each + 32768.5f);
        bytes[k] = whole >> 8, bytes[columns + k] = whole & 255;
    }
}

#endif
