/* A tile of sweep.c for one instruction set: included once for each, with NAME, TARGET, VECTORS (of a tile's row of
 * LANES) and AT_ONCE (columns whose sums fit the registers). */
#define floats NAME(floats)
#define wholes NAME(wholes)
#define tile NAME(tile)
typedef float floats __attribute__((vector_size(4 * LANES / VECTORS), may_alias));
typedef int32_t wholes __attribute__((vector_size(4 * LANES / VECTORS), may_alias));

/* A tile's room: `width` times VECTORS each. */
struct tile {
    floats *weights, *errors, *scores;
    wholes *kept, *ahead;
};

/* weights[column ..] -= factor[..first][column ..] errors[..first]; `factor` is transposed, so a column is contiguous. */
INLINED void NAME(take_up)(struct tile tile, const float *factor, int64_t width, int64_t first, int64_t column,
                     const int count) {
    floats sums[AT_ONCE][VECTORS];
    for (int c = 0; c < count; c++)
        for (int v = 0; v < VECTORS; v++) sums[c][v] = tile.weights[VECTORS * (column + c) + v];
    for (int64_t i = 0; i < first; i++)
        for (int c = 0; c < count; c++)
            for (int v = 0; v < VECTORS; v++) sums[c][v] -= factor[(column + c) * width + i] * tile.errors[VECTORS * i + v];
    for (int c = 0; c < count; c++)
        for (int v = 0; v < VECTORS; v++) tile.weights[VECTORS * (column + c) + v] = sums[c][v];
}

/* The best n of the columns first..last of every row, by (w / U_jj)²; masks.c has the rule. */
INLINED void NAME(choose)(struct tile tile, const float *factor, const float *alive, int64_t width, int64_t first,
                    int64_t last, int n) {
    for (int64_t j = first; j < last; j++)
        for (int v = 0; v < VECTORS; v++) {
            floats ratio = tile.weights[VECTORS * j + v] / factor[j * width + j];
            tile.scores[VECTORS * j + v] = ratio * ratio * alive[j];
            tile.ahead[VECTORS * j + v] = (wholes){0};
            for (int64_t i = first; i < j; i++) {
                wholes wins = tile.scores[VECTORS * j + v] >= tile.scores[VECTORS * i + v]; /* -1 where it does */
                tile.ahead[VECTORS * i + v] -= wins;
                tile.ahead[VECTORS * j + v] += 1 + wins;
            }
        }
    for (int64_t j = first; j < last; j++)
        for (int v = 0; v < VECTORS; v++) tile.kept[VECTORS * j + v] = tile.ahead[VECTORS * j + v] < n;
}

/* `count` rows, at most LANES: the rest of a tile is zero. `room` is ROOM times `width` floats. */
TARGET static void NAME(sweep_rows)(float *values, uint8_t *kept, const float *factor, const float *alive, int64_t width, int64_t m,
                        int n, int64_t count, float *room) {
    int64_t each = VECTORS * width;
    floats *own = (floats *)room;
    struct tile tile = {own, own + each, own + 2 * each, (wholes *)(own + 3 * each), (wholes *)(own + 4 * each)};
    float *weights = (float *)tile.weights;
    int32_t *stays = (int32_t *)tile.kept;
    memset(weights, 0, width * LANES * 4);
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < width; j++) weights[j * LANES + r] = values[r * width + j];
    if (!n) {
        memset(stays, 0, width * LANES * 4);
        for (int64_t r = 0; r < count; r++)
            for (int64_t j = 0; j < width; j++) stays[j * LANES + r] = -kept[r * width + j];
    }
    for (int64_t first = 0, last; first < width; first = last) {
        last = first + m < width ? first + m : width;
        int64_t column = first;
        for (; column + AT_ONCE <= last; column += AT_ONCE) NAME(take_up)(tile, factor, width, first, column, AT_ONCE);
        for (; column < last; column++) NAME(take_up)(tile, factor, width, first, column, 1);
        if (n) NAME(choose)(tile, factor, alive, width, first, last, n);
        for (int64_t j = first; j < last; j++)
            for (int v = 0; v < VECTORS; v++) {
                wholes stay = tile.kept[VECTORS * j + v];
                floats error = (floats)((wholes)(tile.weights[VECTORS * j + v] / factor[j * width + j]) & ~stay);
                tile.errors[VECTORS * j + v] = error;
                tile.weights[VECTORS * j + v] = (floats)((wholes)tile.weights[VECTORS * j + v] & stay);
                for (int64_t k = j + 1; k < last; k++) tile.weights[VECTORS * k + v] -= factor[k * width + j] * error;
            }
    }
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < width; j++) values[r * width + j] = weights[j * LANES + r];
    if (n)
        for (int64_t r = 0; r < count; r++)
            for (int64_t j = 0; j < width; j++) kept[r * width + j] = -stays[j * LANES + r];
}

#undef floats
#undef wholes
#undef tile
#undef NAME
#undef TARGET
#undef VECTORS
#undef AT_ONCE
