/* What all C sources share: the instruction sets, and how work is given to threads. */
#ifndef SECATEUR_NATIVE_H
#define SECATEUR_NATIVE_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef EMULATED /* AVX-512 on a machine that has none: make sanitize */
#define X86 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#endif

/* AVX512: with VBMI2 (expands 8 and 16 bits) and VNNI (dot products of bytes), from Ice Lake and Zen 4 on; AVX512_BF16: with
 * dot products of bfloat16 too. */
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

#define INLINED static inline __attribute__((always_inline))

/* For a routine in plain C that is inlined into one for each instruction set, for the compiler to vectorise. */
#ifdef EMULATED
#define FOR_AVX2
#define FOR_AVX512
#elif defined(X86)
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif

#ifdef X86
#define FASTEST(isa, NAME) ((isa) >= AVX512 ? avx512_##NAME : (isa) == AVX2 ? avx2_##NAME : portable_##NAME)
#else
#define FASTEST(isa, NAME) ((void)(isa), portable_##NAME)
#endif

/* Rows first..last of every thread; the shares differ by one row at most. */
#define EACH_THREAD(...)                                                                                           \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int t = 0; t < threads; t++) {          \
        int64_t first = rows * t / threads, last = rows * (t + 1) / threads;                                       \
        __VA_ARGS__                                                                                                \
    }

#endif
