/* What the numbers of a matrix are: zeros, negative ones among them, NaN, Inf, and how many of 4, 8 and 16 neighbours in a
 * row are not zero at most. One pass, bound by memory. counts.py says the same in torch, and is its definition.
 *
 * Numbers are looked at as their bits: without the sign they are 0, `inf`, at least `nan`, or plain.
 */
#include "native.h"

enum { OF_ROWS = 7, OF_16 = 6 };
/* A chunk is whole groups, and few enough for a number of that type to count them. */
#define CHUNK(TYPE) (sizeof(TYPE) == 1 ? 240 : 3840)
#define LESS(a, b) ((a) < (b) ? (a) : (b))
struct bits {
    uint64_t inf, nan;
};

INLINED uint8_t greatest(const uint8_t *values, int64_t count, uint8_t most) {
    for (int64_t i = 0; i < count; i++) most = values[i] > most ? values[i] : most;
    return most;
}

/* Add what a chunk holds to the first four of `counts`, and raise the other three. */
#define COUNT_CHUNK(TYPE, NAME)                                                                                    \
    INLINED void chunk_##NAME(const TYPE *x, int64_t count, TYPE inf, TYPE nan, int64_t *counts) {                 \
        const TYPE sign = (TYPE)1 << (8 * sizeof(TYPE) - 1);                                                       \
        uint8_t live[CHUNK(TYPE)], sums[CHUNK(TYPE) / 4];                                                          \
        TYPE alive = 0, negative = 0, odd = 0, infinite = 0;                                                       \
        for (int64_t i = 0; i < count; i++) {                                                                      \
            TYPE size = x[i] & (TYPE)~sign;                                                                        \
            live[i] = size != 0;                                                                                   \
            alive += size != 0;                                                                                    \
            negative += x[i] == sign;                                                                              \
            odd += size >= nan;                                                                                    \
            infinite += size == inf;                                                                               \
        }                                                                                                          \
        counts[0] += count - alive, counts[1] += negative, counts[2] += odd, counts[3] += infinite;                \
        if (counts[OF_16] == 16) return; /* nothing is denser */                                                   \
        int64_t groups = count / 4;                                                                                \
        for (int64_t i = 0; i < groups; i++)                                                                       \
            sums[i] = live[4 * i] + live[4 * i + 1] + live[4 * i + 2] + live[4 * i + 3];                           \
        for (int of = 4; of < OF_ROWS; of++) {                                                                     \
            counts[of] = greatest(sums, groups, (uint8_t)counts[of]);                                              \
            groups /= 2;                                                                                           \
            for (int64_t i = 0; i < groups; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];                          \
        }                                                                                                          \
    }
COUNT_CHUNK(uint8_t, 1)
COUNT_CHUNK(uint16_t, 2)
COUNT_CHUNK(uint32_t, 4)
COUNT_CHUNK(uint64_t, 8)

#define COUNT_ROWS(PREFIX, TYPE, NAME, TARGET)                                                                     \
    TARGET static void PREFIX##_##NAME(const void *all, int64_t first, int64_t last, int64_t columns,              \
                                       struct bits bits, int64_t *counts) {                                        \
        const TYPE *x = (const TYPE *)all;                                                                         \
        for (int64_t row = first; row < last; row++)                                                               \
            for (int64_t start = 0; start < columns; start += CHUNK(TYPE))                                         \
                chunk_##NAME(x + row * columns + start, LESS(columns - start, CHUNK(TYPE)),                        \
                             (TYPE)bits.inf, (TYPE)bits.nan, counts);                                              \
    }
#define COUNT_ALL(PREFIX, TARGET)                                                                                  \
    COUNT_ROWS(PREFIX, uint8_t, 1, TARGET)                                                                         \
    COUNT_ROWS(PREFIX, uint16_t, 2, TARGET)                                                                        \
    COUNT_ROWS(PREFIX, uint32_t, 4, TARGET)                                                                        \
    COUNT_ROWS(PREFIX, uint64_t, 8, TARGET)
COUNT_ALL(portable, )
#ifdef X86
COUNT_ALL(avx2, FOR_AVX2)
COUNT_ALL(avx512, FOR_AVX512)
#endif

/* Zeros, negative zeros, NaN, Inf, and the most that are not zero of 4, 8 and 16 neighbours, into counts[7]. `size` is
 * bytes a number. */
void secateur_count(int isa, int size, const void *x, int64_t rows, int64_t columns, uint64_t inf, uint64_t nan,
                    int64_t *counts, int threads) {
    const struct bits bits = {inf, nan};
    memset(counts, 0, OF_ROWS * sizeof *counts);
    EACH_THREAD({
        int64_t own[OF_ROWS] = {0};
        switch (size) {
        case 1: FASTEST(isa, 1)(x, first, last, columns, bits, own); break;
        case 2: FASTEST(isa, 2)(x, first, last, columns, bits, own); break;
        case 4: FASTEST(isa, 4)(x, first, last, columns, bits, own); break;
        default: FASTEST(isa, 8)(x, first, last, columns, bits, own);
        }
        _Pragma("omp critical") {
            for (int i = 0; i < 4; i++) counts[i] += own[i];
            for (int i = 4; i < OF_ROWS; i++) counts[i] = own[i] > counts[i] ? own[i] : counts[i];
        }
    })
}
