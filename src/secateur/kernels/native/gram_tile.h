/* A tile of gram.c for one instruction set and one kind of steps: included once for each, with NAME, TARGET, STEP (what a
 * step of a column is held in), VECTOR, LANES (steps in it), ROWS and ACROSS (vectors; their sums fit the registers), and
 * LOADED, SPREAD, ADDED, of which the last may be one instruction for two tokens. */

/* sums [WIDTH][WIDTH] += left' right, over steps of [WIDTH] columns each. */
TARGET static void NAME(tile)(const void *left_steps, const void *right_steps, int64_t steps, double *sums) {
    typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
    const STEP *left = left_steps, *right = right_steps;
    for (int row = 0; row < WIDTH; row += ROWS)
        for (int column = 0; column < WIDTH; column += ACROSS * LANES) {
            floats part[ROWS][ACROSS];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < ACROSS; v++) part[r][v] = (floats){0};
            for (int64_t s = 0; s < steps; s++) {
                VECTOR seen[ACROSS];
                for (int v = 0; v < ACROSS; v++) seen[v] = LOADED(right + s * WIDTH + column + v * LANES);
                for (int r = 0; r < ROWS; r++) {
                    VECTOR own = SPREAD(left[s * WIDTH + row + r]);
                    for (int v = 0; v < ACROSS; v++) part[r][v] = ADDED(part[r][v], own, seen[v]);
                }
            }
            for (int r = 0; r < ROWS; r++) {
                double *to = sums + (row + r) * WIDTH + column;
                for (int v = 0; v < ACROSS; v++)
                    for (int l = 0; l < LANES; l++) to[v * LANES + l] += part[r][v][l];
            }
        }
}

#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef ACROSS
