/* Products with a packed sparse matrix on a GPU: y = x Wᵀ for one to eight rows of x, 16 bit values.
 *
 * The format is that of packed.c: a bit for each column, the kept values of a row in order, `starts[r]` the place of
 * row r's first one. A word of 64 columns is read here as two of 32. x is [batch][stride], stride a multiple of `STEP`
 * and zero where W has no column; y is [batch][rows] in float, or in the type of the values with `narrow`. `values`
 * begins at a multiple of 16 bytes.
 *
 * A block takes `ROWS` rows, and its warps take turns at chunks of `CHUNK` columns. In a chunk a lane first loads 32
 * columns of the bitmap, so that the warp's prefix sums of their counts say where each word's values are; then the
 * values, which are contiguous, come to shared memory 16 bytes a lane. In the products each lane has four neighbouring
 * columns of `STEP`, and the values that it reads lie side by side with those of its neighbours: no bank conflicts from
 * half of the weights gone on.
 *
 * The sums are made by the tensor cores, because converting to float and adding one by one would take longer than
 * reading. A lane's four values are already where the unit wants part of a 16 x 16 matrix A, and its four activations
 * are where it wants part of a 16 x 8 matrix B: rows 0 to 7 of A are then eight pieces of one row of W, rows 8 to 15 of
 * another one, column n of B the piece of x that belongs to rows n and n + 8. What is wanted is the diagonal of each
 * half of A B; the rest is thrown away, which costs nothing as these units are idle otherwise.
 *
 * No header is needed, so that it compiles at run time without a toolkit. With `EMULATED` the instructions that C++
 * does not have come from a test instead, which runs all of this on a CPU.
 */

enum { WARP = 32, WARPS = 4, ROWS = 4, PAIRS = ROWS / 2 };
enum { STEP = 4 * WARP, CHUNK = 32 * WARP, STEPS = CHUNK / STEP };
enum { UNIT = 8 }; /* values of 16 bytes */
#define ALL_LANES 0xffffffffu

struct __align__(8) Place { /* 32 columns of a row: which are kept, and where in shared memory their values begin */
    unsigned bits, values;
};
struct __align__(8) Four { /* 16 bit numbers of four neighbouring columns */
    unsigned low, high;
};
struct __align__(16) Shared {
    unsigned short values[WARPS][ROWS][CHUNK + UNIT];
    Place places[WARPS][ROWS][WARP];
    unsigned kept[2][WARPS][PAIRS]; /* in turns, as a warp may be one turn ahead of another */
};

#ifndef EMULATED
/* 16 bytes from global to shared memory, which arrive before `wait_for_copies` is done. */
__device__ __forceinline__ void copy_unit(unsigned to, const unsigned short *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* The value at a place in shared memory, which then moves on, where the condition holds; else zero. In C++ the place is
 * first moved in another register and then copied back. */
__device__ __forceinline__ unsigned next_value(unsigned condition, unsigned *place) {
    unsigned value = 0;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.shared.u16 %0, [%1]; @p add.u32 %1, %1, 2;}"
                 : "+r"(value), "+r"(*place)
                 : "r"(condition)
                 : "memory");
    return value;
}

__device__ __forceinline__ unsigned shared_place(const unsigned short *values) {
    return (unsigned)__cvta_generic_to_shared(values);
}

__device__ __forceinline__ unsigned short rounded(float value, bool bfloat) {
    unsigned short bits;
    if (bfloat)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

/* sum += A B for a pair of rows of W and one of x. */
template <bool BFLOAT>
__device__ __forceinline__ void add_products(float *sum, Four first, Four second, Four x) {
#define MULTIPLY(TYPE)                                                                                                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "          \
        "{%0,%1,%2,%3};"                                                                                               \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                       \
        : "r"(first.low), "r"(second.low), "r"(first.high), "r"(second.high), "r"(x.low), "r"(x.high))
    if (BFLOAT)
        MULTIPLY("bf16");
    else
        MULTIPLY("f16");
}
#endif

/* The sum of what the lanes before this one have; `all` is the sum over the warp. */
__device__ __forceinline__ unsigned sum_before(unsigned own, int lane, unsigned *all) {
    unsigned sum = own;
#pragma unroll
    for (int by = 1; by < WARP; by *= 2) {
        unsigned other = __shfl_up_sync(ALL_LANES, sum, by);
        if (lane >= by) sum += other;
    }
    *all = __shfl_sync(ALL_LANES, sum, WARP - 1);
    return sum - own;
}

/* Counts of the rows of a pair are summed in one number, 16 bits each; none is above WARPS * CHUNK. */
__device__ __forceinline__ unsigned of_row(const unsigned *counts, int r) { return counts[r / 2] >> 16 * (r % 2) & 0xffff; }

/* The weights of columns 4 (lane % 8) and the three after it in 32 columns; zero where the bit is not set. */
__device__ __forceinline__ Four expand(Place place, int lane) {
    unsigned shift = 4 * (lane % 8), mine = place.bits >> shift;
    unsigned at = place.values + 2 * __popc(place.bits & ((1u << shift) - 1));
    unsigned number[4];
#pragma unroll
    for (int i = 0; i < 4; i++) number[i] = next_value(mine & (1u << i), &at);
    Four four = {number[0] + number[1] * 65536, number[2] + number[3] * 65536};
    return four;
}

/* A lane's 32 columns of each row, no bit set beyond the matrix. */
__device__ __forceinline__ void load_bits(unsigned *bits, const unsigned *bitmap, const unsigned *rows, int word,
                                          int words) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) bits[r] = word < words ? bitmap[rows[r] + word] : 0;
}

template <int BATCH, bool BFLOAT>
__global__ void __launch_bounds__(WARPS *WARP)
    multiply(const unsigned *bitmap, const unsigned short *values, const long long *starts, const unsigned short *x,
             void *y, int rows, int words, int stride, int narrow) {
    __shared__ Shared shared;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first_row = blockIdx.x * ROWS;
    const long long start = starts[first_row] / UNIT * UNIT;
    const unsigned short *mine = values + start + UNIT * lane;
    const unsigned target = shared_place(&shared.values[warp][0][UNIT * lane]);
    unsigned bits[ROWS], row_words[ROWS], row_values[ROWS]; /* the latter two are places in `bitmap` and after `start` */
    float sum[PAIRS][BATCH][4];
    for (int r = 0; r < ROWS; r++) {
        const int row = min(first_row + r, rows - 1); /* the last row again where there is no other one */
        row_words[r] = (unsigned)row * words;
        row_values[r] = (unsigned)(starts[row] - start);
    }
    for (int p = 0; p < PAIRS; p++)
        for (int b = 0; b < BATCH; b++)
            for (int i = 0; i < 4; i++) sum[p][b][i] = 0;
    load_bits(bits, bitmap, row_words, warp * WARP + lane, words);

    const int chunks = (words + WARP - 1) / WARP;
    for (int turn = 0; turn * WARPS < chunks; turn++) {
        const int chunk = turn * WARPS + warp;
        unsigned before[PAIRS], all[PAIRS], earlier[PAIRS] = {0}, total[PAIRS] = {0};
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            before[p] = sum_before(__popc(bits[2 * p]) + (__popc(bits[2 * p + 1]) << 16), lane, &all[p]);
            if (lane == 0) shared.kept[turn % 2][warp][p] = all[p];
        }
        /* Besides the counts being there: no lane of this warp still reads the values, which are overwritten now. */
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            for (int p = 0; p < PAIRS; p++) {
                const unsigned kept = shared.kept[turn % 2][w][p];
                if (w < warp) earlier[p] += kept;
                total[p] += kept;
            }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            /* Copies begin at a multiple of 16 bytes, so up to seven values of what comes before are copied too. */
            const unsigned from = row_values[r] + of_row(earlier, r), skip = from % UNIT, end = skip + of_row(all, r);
            const unsigned short *source = mine + (from - skip);
            row_values[r] += of_row(total, r);
#pragma unroll
            for (int i = 0; i < CHUNK + UNIT; i += UNIT * WARP)
                if (i + UNIT * lane < end) copy_unit(target + 2 * (r * (CHUNK + UNIT) + i), source + i);
            const Place place = {bits[r], shared_place(&shared.values[warp][r][skip + of_row(before, r)])};
            shared.places[warp][r][lane] = place;
        }
        load_bits(bits, bitmap, row_words, (chunk + WARPS) * WARP + lane, words);
        wait_for_copies();
        __syncwarp();

        const int steps = min(STEPS, stride / STEP - chunk * STEPS);
        const unsigned short *x_at = x + chunk * CHUNK + 4 * lane;
        for (int word = lane / 8; word < steps * (STEP / 32); word += STEP / 32, x_at += STEP) {
            Four piece[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) piece[b] = *(const Four *)(x_at + (long long)b * stride);
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                Four first = expand(shared.places[warp][2 * p][word], lane);
                Four second = expand(shared.places[warp][2 * p + 1][word], lane);
#pragma unroll
                for (int b = 0; b < BATCH; b++) add_products<BFLOAT>(sum[p][b], first, second, piece[b]);
            }
        }
    }

    /* Row n of A B is in lanes 4 n to 4 n + 3, of which each has two columns: n is with lane 4 n + n / 2. The values
     * are no longer wanted, and their memory takes the pieces of the sums. */
    float *pieces = (float *)&shared;
    __syncthreads();
    const int n = lane / 4;
    if (lane % 4 == n / 2)
        for (int p = 0; p < PAIRS; p++)
            for (int b = 0; b < BATCH; b++)
                for (int half = 0; half < 2; half++)
                    pieces[((2 * p + half) * BATCH + b) * (WARPS * 8) + warp * 8 + n] =
                        n % 2 ? sum[p][b][2 * half + 1] : sum[p][b][2 * half];
    __syncthreads();
    const int r = threadIdx.x / BATCH, b = threadIdx.x % BATCH;
    if (r < ROWS && first_row + r < rows) {
        float total = 0;
        for (int i = 0; i < WARPS * 8; i++) total += pieces[threadIdx.x * (WARPS * 8) + i];
        const long long place = (long long)b * rows + first_row + r;
        if (narrow)
            ((unsigned short *)y)[place] = rounded(total, BFLOAT);
        else
            ((float *)y)[place] = total;
    }
}
