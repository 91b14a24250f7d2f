/* Rounding to grids of few bits (methods/rounding.py): the levels of a block of columns, one column after the other, and
 * which scale of several serves a group best. A level is a multiple of a step that grows with its magnitude. Rows are
 * independent: LANES of them make a tile, as in sweep.c.
 */
#include "native.h"

enum { LANES = 16, ROOM = 6 * LANES }; /* rows of a tile; floats that it takes for each column */

/* Levels between lowest and highest; `share` of the power of two under a level is its step, at least `step`. */
struct grid {
    float lowest, highest, share, step;
};

#define NAME(of) portable_##of
#define TARGET
#define VECTORS 4
#include "round_tile.h"
#ifdef X86
#define NAME(of) avx2_##of
#define TARGET FOR_AVX2
#define VECTORS 2
#include "round_tile.h"
#define NAME(of) avx512_##of
#define TARGET FOR_AVX512
#define VECTORS 1
#include "round_tile.h"
#endif

/* values [rows][width]: what the columns of a block would be, and as they are left, on the grid. units [rows][width]: the
 * weight of level 1, 0 where it is pruned. zeros [rows][width]: zero points, or NULL where levels lie between lowest and
 * highest. factor [width][width], lower triangular: a column takes up the errors of the earlier ones by its row. old
 * [rows][width]: errors are what a weight is more than it was; NULL: what rounding took off it, over the factor's
 * diagonal. Returns 1 where there is no memory. */
int secateur_round_columns(int isa, float *values, const float *old, const float *units, const float *zeros,
                           const float *factor, int64_t rows, int64_t width, float lowest, float highest, float share,
                           float step, int threads) {
    struct grid grid = {lowest, highest, share, step};
    void (*columns)(float *, const float *, const float *, const float *, const float *, int64_t, int64_t, struct grid,
                    float *) = FASTEST(isa, round_rows);
    float *room = aligned_alloc(64, (size_t)threads * ROOM * width * 4);
    if (!room) return 1;
    EACH_THREAD(for (int64_t r = first; r < last; r += LANES)
                    columns(values + r * width, old ? old + r * width : NULL, units + r * width,
                            zeros ? zeros + r * width : NULL, factor, width, last - r < LANES ? last - r : LANES, grid,
                            room + t * ROOM * width);)
    free(room);
    return 0;
}

/* weight [rows][groups][size]; importance [groups][size]; scales, zeros [choices][rows][groups] (zeros may be NULL). Writes
 * to best [rows][groups] which choice makes the sum of importance · (rounded − weight)² least, the first of equals.
 * Returns 1 where there is no memory. */
int secateur_best_scales(int isa, const float *weight, const float *importance, const float *scales, const float *zeros,
                         int64_t *best, int64_t rows, int64_t groups, int64_t size, int64_t choices, float lowest,
                         float highest, float share, float step, int threads) {
    struct grid grid = {lowest, highest, share, step};
    float (*loss)(const float *, const float *, int64_t, float, struct grid) = FASTEST(isa, loss_of);
    int64_t padded = (size + LANES - 1) / LANES * LANES;
    float *room = aligned_alloc(64, (size_t)threads * 2 * padded * 4);
    if (!room) return 1;
    EACH_THREAD(float *own = room + t * 2 * padded; memset(own, 0, 2 * padded * 4);
                for (int64_t g = 0; g < groups; g++) {
                    memcpy(own + padded, importance + g * size, size * 4);
                    for (int64_t r = first; r < last; r++) {
                        float least = 0;
                        memcpy(own, weight + (r * groups + g) * size, size * 4);
                        for (int64_t c = 0; c < choices; c++) {
                            int64_t at = (c * rows + r) * groups + g;
                            struct grid its = grid;
                            if (zeros) its.lowest = -zeros[at], its.highest = its.lowest + grid.highest - grid.lowest;
                            float lost = loss(own, own + padded, padded, scales[at], its);
                            if (!c || lost < least) least = lost, best[r * groups + g] = c;
                        }
                    }
                })
    free(room);
    return 0;
}
