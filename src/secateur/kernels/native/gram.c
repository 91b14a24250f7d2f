/* Sums over tokens of what enters a layer (gram.py): its squares, and its products with itself or with another input.
 *
 * Columns are copied into panels, WIDTH of them side by side, token after token; a panel times another makes a tile of the
 * result, in floats for DEPTH steps, then in doubles. A Gram matrix is symmetric: half of the tiles are computed. With
 * dot products of bfloat16 a step is two tokens, else one; the products of two bfloat16 are exact either way.
 */
#include "packed.h"

enum { F32 = 0, BF16 = 1 };
enum { WIDTH = 48, DEPTH = 256, TOGETHER = 4, CHUNK = 4096 };
enum { BROAD = 1024, SHORT = 512 }; /* columns and tokens whose squares are floats */

#define LOADED(p) (*(const VECTOR *)(p))
#define SPREAD(x) ((x) - (VECTOR){0})
#define ADDED(sum, a, b) ((sum) + (a) * (b))
#define STEP float
#define VECTOR floats

#define NAME(of) portable_##of
#define TARGET
#define LANES 4
#define ROWS 6
#define ACROSS 2
#include "gram_tile.h"
#ifdef X86
#define NAME(of) avx2_##of
#define TARGET FOR_AVX2
#define LANES 8
#define ROWS 6
#define ACROSS 2
#include "gram_tile.h"
#define NAME(of) avx512_##of
#define TARGET FOR_AVX512
#define LANES 16
#define ROWS 8
#define ACROSS 3
#include "gram_tile.h"

#undef LOADED
#undef SPREAD
#undef ADDED
#undef STEP
#undef VECTOR
#define LOADED(p) BF16S(p)
#define SPREAD(x) ((__m512bh)_mm512_set1_epi32(x))
#define ADDED(sum, a, b) ((floats)_mm512_dpbf16_ps((__m512)(sum), a, b))
#define STEP uint32_t
#define VECTOR __m512bh
#pragma GCC push_options
#ifndef EMULATED
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif
#define NAME(of) paired_##of
#define TARGET
#define LANES 16
#define ROWS 8
#define ACROSS 3
#include "gram_tile.h"
#pragma GCC pop_options
#endif

/* What a column of x is in a step: the float, or two tokens of bfloat16, the second zero where there is none. */
INLINED void copy_floats(const float *x, int64_t columns, uint32_t *to) { memcpy(to, x, 4 * columns); }
INLINED void copy_widened(const uint16_t *x, int64_t columns, uint32_t *to) {
    for (int64_t c = 0; c < columns; c++) to[c] = (uint32_t)x[c] << 16;
}
INLINED void copy_pairs(const uint16_t *x, const uint16_t *next, int64_t columns, uint32_t *to) {
    if (next)
        for (int64_t c = 0; c < columns; c++) to[c] = x[c] | (uint32_t)next[c] << 16;
    else
        for (int64_t c = 0; c < columns; c++) to[c] = x[c];
}

/* x [tokens][columns] as panels [panels][steps][WIDTH], zero where there is no column. */
static void copy_panels(const void *x, int kind, int paired, int64_t tokens, int64_t columns, uint32_t *panels, int threads) {
    int64_t rows = paired ? (tokens + 1) / 2 : tokens;
    EACH_THREAD(for (int64_t s = first; s < last; s++) for (int64_t from = 0; from < columns; from += WIDTH) {
        int64_t count = columns - from < WIDTH ? columns - from : WIDTH, token = paired ? 2 * s : s;
        const uint16_t *narrow = (const uint16_t *)x + token * columns + from;
        uint32_t *to = panels + (from * rows + s * WIDTH);
        if (kind == F32) copy_floats((const float *)x + token * columns + from, count, to);
        else if (!paired) copy_widened(narrow, count, to);
        else copy_pairs(narrow, token + 1 < tokens ? narrow + columns : 0, count, to);
        memset(to + count, 0, 4 * (WIDTH - count));
    })
}

/* total [columns][columns] += left' right, both [tokens][columns], floats or bfloat16; where they are the same matrix the
 * tiles below the diagonal are copies of those above. Returns 1 where there is no memory. */
int secateur_add_products(int isa, int kind, const void *left, const void *right, double *total, int64_t tokens,
                          int64_t columns, int threads) {
    void (*tile)(const void *, const void *, int64_t, double *) = FASTEST(isa, tile);
    int paired = 0, same = left == right;
#ifdef X86
    if (kind == BF16 && isa == AVX512_BF16) tile = paired_tile, paired = 1;
#endif
    int64_t panels = (columns + WIDTH - 1) / WIDTH, most = tokens < CHUNK ? tokens : CHUNK;
    int64_t room = panels * WIDTH * (paired ? (most + 1) / 2 : most), rows = same ? panels * (panels + 1) / 2 : panels * panels;
    uint32_t *lefts = aligned_alloc(64, 4 * room * (same ? 1 : 2)), *rights = same ? lefts : lefts + room;
    if (!lefts) return 1;
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        int64_t now = tokens - start < CHUNK ? tokens - start : CHUNK, steps = paired ? (now + 1) / 2 : now;
        int64_t offset = start * columns * (kind == F32 ? 4 : 2);
        copy_panels((const char *)left + offset, kind, paired, now, columns, lefts, threads);
        if (!same) copy_panels((const char *)right + offset, kind, paired, now, columns, rights, threads);
        EACH_THREAD(
            double sums[WIDTH * WIDTH];
            int64_t turn = 0;
            /* Some panels on the left at a time, that one on the right is read from memory once for all of them. */
            for (int64_t group = 0; group < panels; group += TOGETHER)
                for (int64_t j = same ? group : 0; j < panels; j++)
                    for (int64_t i = group; i < group + TOGETHER && i < panels && (!same || i <= j); i++, turn++) {
                        if (turn < first || turn >= last) continue;
                        memset(sums, 0, sizeof sums);
                        for (int64_t s = 0; s < steps; s += DEPTH)
                            tile(lefts + (i * steps + s) * WIDTH, rights + (j * steps + s) * WIDTH,
                                 steps - s < DEPTH ? steps - s : DEPTH, sums);
                        int64_t across = columns - j * WIDTH < WIDTH ? columns - j * WIDTH : WIDTH;
                        int64_t down = columns - i * WIDTH < WIDTH ? columns - i * WIDTH : WIDTH;
                        double *to = total + i * WIDTH * columns + j * WIDTH;
                        double *mirrored = total + j * WIDTH * columns + i * WIDTH;
                        for (int64_t r = 0; r < down; r++)
                            for (int64_t c = 0; c < across; c++) to[r * columns + c] += sums[r * WIDTH + c];
                        if (same && i != j)
                            for (int64_t c = 0; c < across; c++)
                                for (int64_t r = 0; r < down; r++) mirrored[c * columns + r] += sums[r * WIDTH + c];
                    })
    }
    free(lefts);
    return 0;
}

/* total [first..last] += the squares of these columns of x, in floats for SHORT tokens, then in doubles. */
INLINED void squares(int kind, const void *x, double *total, int64_t tokens, int64_t columns, int64_t first, int64_t last) {
    float sums[BROAD];
    for (int64_t from = first; from < last; from += BROAD) {
        int64_t count = last - from < BROAD ? last - from : BROAD;
        for (int64_t start = 0; start < tokens; start += SHORT) {
            int64_t end = tokens - start < SHORT ? tokens : start + SHORT;
            memset(sums, 0, sizeof sums);
            for (int64_t place = start * columns + from; place < end * columns; place += columns)
                if (kind == F32)
                    for (int64_t c = 0; c < count; c++) sums[c] += ((const float *)x)[place + c] * ((const float *)x)[place + c];
                else
                    for (int64_t c = 0; c < count; c++) {
                        float wide = widen(((const uint16_t *)x)[place + c]);
                        sums[c] += wide * wide;
                    }
            for (int64_t c = 0; c < count; c++) total[from + c] += sums[c];
        }
    }
}
#define SQUARES(NAME, KIND, TARGET)                                                                                \
    TARGET static void NAME(const void *x, double *total, int64_t tokens, int64_t columns, int64_t first, int64_t last) { \
        squares(KIND, x, total, tokens, columns, first, last);                                                     \
    }
SQUARES(portable_f32, F32, )
SQUARES(portable_bf16, BF16, )
#ifdef X86
SQUARES(avx2_f32, F32, FOR_AVX2)
SQUARES(avx2_bf16, BF16, FOR_AVX2)
SQUARES(avx512_f32, F32, FOR_AVX512)
SQUARES(avx512_bf16, BF16, FOR_AVX512)
#endif

/* total [rows] += the squares of x [tokens][rows], floats or bfloat16. */
void secateur_add_squares(int isa, int kind, const void *x, double *total, int64_t tokens, int64_t rows, int threads) {
    void (*add)(const void *, double *, int64_t, int64_t, int64_t, int64_t) = kind == F32 ? FASTEST(isa, f32) : FASTEST(isa, bf16);
    EACH_THREAD(add(x, total, tokens, rows, first, last);)
}
