/* SparseGPT's sweep over a block of columns (column_sweep.py): weights go one column after the other, and the later ones take
 * up the error. Rows are independent, so a vector holds one column of several rows, and LANES rows make a tile whose
 * weights and errors stay in the first cache. A column takes up all earlier errors when its turn comes, some columns at
 * a time: the sums are in registers, and there is no store but the last.
 */
#include "native.h"

enum { LANES = 16, ROOM = 5 * LANES }; /* rows of a tile; floats that it takes for each column */

#define NAME(of) portable_##of
#define TARGET
#define VECTORS 4
#define AT_ONCE 2
#include "sweep_tile.h"
#ifdef X86
#define NAME(of) avx2_##of
#define TARGET FOR_AVX2
#define VECTORS 2
#define AT_ONCE 4
#include "sweep_tile.h"
#define NAME(of) avx512_##of
#define TARGET FOR_AVX512
#define VECTORS 1
#define AT_ONCE 4
#include "sweep_tile.h"
#endif

/* values [rows][width]: the weights of a block as the sweep finds them, and as it leaves them, zero where they go.
 * factor [width][width]: the transpose of U, lower triangular. kept [rows][width], a byte each, is read if n is 0, and
 * written otherwise: the best n of every m, chosen when the sweep reaches them; alive [width] is 0 for columns that go
 * first, otherwise 1. Returns 1 where there is no memory. */
int secateur_sweep_block(int isa, float *values, uint8_t *kept, const float *factor, const float *alive, int64_t rows,
                         int64_t width, int64_t m, int n, int threads) {
    void (*sweep)(float *, uint8_t *, const float *, const float *, int64_t, int64_t, int, int64_t, float *) =
        FASTEST(isa, sweep_rows);
    float *room = aligned_alloc(64, (size_t)threads * ROOM * width * 4);
    if (!room) return 1;
    EACH_THREAD(for (int64_t r = first; r < last; r += LANES)
                    sweep(values + r * width, kept + r * width, factor, alive, width, m, n,
                          last - r < LANES ? last - r : LANES, room + t * ROOM * width);)
    free(room);
    return 0;
}
