/* A tile of round.c for one instruction set: included once for each, with NAME, TARGET and VECTORS (of a tile's row). */
#define floats NAME(floats_of_rounding)
#define wholes NAME(wholes_of_rounding)
typedef float floats __attribute__((vector_size(4 * LANES / VECTORS), may_alias));
typedef int32_t wholes __attribute__((vector_size(4 * LANES / VECTORS), may_alias));

TARGET INLINED floats NAME(chosen)(wholes which, floats yes, floats no) {
    return (floats)(((wholes)yes & which) | ((wholes)no & ~which));
}

TARGET INLINED floats NAME(between)(floats x, floats lowest, floats highest) {
    x = NAME(chosen)(x < lowest, lowest, x);
    return NAME(chosen)(x > highest, highest, x);
}

/* To whole numbers, halves to even, for |x| < 2²². */
TARGET INLINED floats NAME(whole)(floats x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

/* The levels nearest to x. */
TARGET INLINED floats NAME(levels)(floats x, floats lowest, floats highest, struct grid grid) {
    x = NAME(between)(x, lowest - 1, highest + 1);
    if (grid.share) {
        wholes power = (wholes)x & 0x7f800000; /* 2^⌊log₂ |x|⌋ */
        floats step = (floats)power * grid.share;
        step = NAME(chosen)(step < grid.step, (floats){0} + grid.step, step);
        return NAME(between)(NAME(whole)(x / step) * step, lowest, highest);
    }
    return NAME(between)(NAME(whole)(x), lowest, highest);
}

/* `count` rows, at most LANES: the rest of a tile is zero. `room` is ROOM times `width` floats. */
TARGET static void NAME(round_rows)(float *values, const float *old, const float *units, const float *zeros,
                                    const float *factor, int64_t width, int64_t count, struct grid grid, float *room) {
    int64_t each = VECTORS * width;
    floats *weights = (floats *)room, *errors = weights + each, *before = errors + each, *unit = before + each,
           *zero = unit + each;
    memset(room, 0, 5 * width * LANES * 4);
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < width; j++) {
            ((float *)weights)[j * LANES + r] = values[r * width + j];
            ((float *)unit)[j * LANES + r] = units[r * width + j];
            if (old) ((float *)before)[j * LANES + r] = old[r * width + j];
            if (zeros) ((float *)zero)[j * LANES + r] = zeros[r * width + j];
        }
    floats lowest = (floats){0} + grid.lowest, highest = (floats){0} + grid.highest;
    for (int64_t j = 0; j < width; j++)
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = VECTORS * j + v;
            /* four sums, since each would wait for the one before */
            floats sum[4] = {weights[at], (floats){0}, (floats){0}, (floats){0}};
            const float *row = factor + j * width;
            int64_t i = 0;
            for (; i + 4 <= j; i += 4)
                for (int k = 0; k < 4; k++) sum[k] -= row[i + k] * errors[VECTORS * (i + k) + v];
            for (; i < j; i++) sum[0] -= row[i] * errors[VECTORS * i + v];
            floats weight = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            wholes stays = unit[at] > 0;
            if (zeros) lowest = -zero[at], highest = lowest + (grid.highest - grid.lowest);
            floats ratio = NAME(chosen)(stays, weight / unit[at], (floats){0}); /* 0 / 0 is no number */
            floats rounded = NAME(levels)(ratio, lowest, highest, grid) * unit[at];
            errors[at] = old ? rounded - before[at] : (weight - rounded) / row[j];
            weights[at] = rounded;
        }
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < width; j++) values[r * width + j] = ((float *)weights)[j * LANES + r];
}

/* The sum of importance · (rounded − weight)² of a group, a multiple of LANES long. */
TARGET static float NAME(loss_of)(const float *weight, const float *importance, int64_t size, float scale,
                                  struct grid grid) {
    floats sums[VECTORS] = {0}, lowest = (floats){0} + grid.lowest, highest = (floats){0} + grid.highest;
    float inverse = 1 / scale;
    for (int64_t j = 0; j < size; j += LANES)
        for (int v = 0; v < VECTORS; v++) {
            floats w = ((const floats *)(weight + j))[v], off = NAME(levels)(w * inverse, lowest, highest, grid) * scale - w;
            sums[v] += ((const floats *)(importance + j))[v] * (off * off);
        }
    float sum = 0;
    for (int v = 0; v < VECTORS; v++)
        for (int lane = 0; lane < LANES / VECTORS; lane++) sum += sums[v][lane];
    return sum;
}

#undef floats
#undef wholes
#undef NAME
#undef TARGET
#undef VECTORS
