/* Masks: which of some scores are kept, a byte each, 1 or 0. Exact counts; of two equal scores the one at the lower
 * position goes first. masks.py says the same in torch, and is its definition, for NaN too.
 *
 * The lowest of n scores are found by counting, not by ordering: floats become integers of the same order, eleven bits
 * of which choose a bucket; the next ten or eleven are only looked at within it. So three passes over the scores do, and
 * no input is a bad one. All of it is bound by memory: with AVX2 it is no faster.
 */
#include "native.h"

enum { BUCKETS = 2048, CHUNK = 512 };

/* Floats as integers of the same order, -0 as +0 and every NaN last. */
#define NAN_KEY 0xffffffffu
INLINED uint32_t key_of(float score) {
    float sum = score + 0.0f;
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    uint32_t key = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    return score == score ? key : NAN_KEY;
}
static float score_of(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
    float score;
    memcpy(&score, &bits, 4);
    return score;
}

/* Add to `counts` how many scores have each value of their upper eleven bits. */
static void count_upper(const float *scores, int64_t size, uint32_t *counts) {
    uint16_t upper[CHUNK];
    for (int64_t start = 0; start < size; start += CHUNK) {
        int64_t count = size - start < CHUNK ? size - start : CHUNK;
        for (int64_t i = 0; i < count; i++) upper[i] = key_of(scores[start + i]) >> 21;
        for (int64_t i = 0; i < count; i++) counts[upper[i]]++;
    }
}

/* Write the keys of the `wanted` scores that have these upper bits. */
static void collect(const float *scores, int64_t size, uint32_t upper, uint32_t *keys, int64_t wanted) {
    uint32_t chunk[CHUNK];
    int64_t found = 0;
    for (int64_t start = 0; start < size && found < wanted; start += CHUNK) {
        int64_t count = size - start < CHUNK ? size - start : CHUNK;
        for (int64_t i = 0; i < count; i++) chunk[i] = key_of(scores[start + i]);
        for (int64_t i = 0; i < count && found < wanted; i++) {
            keys[found] = chunk[i];
            found += chunk[i] >> 21 == upper;
        }
    }
}

/* kept = not lower than the threshold, or not lower and not equal. */
static void compare(const float *scores, int64_t size, float threshold, int equal_too, uint8_t *kept) {
    if (equal_too)
        for (int64_t i = 0; i < size; i++) kept[i] = !(scores[i] < threshold);
    else
        for (int64_t i = 0; i < size; i++) kept[i] = !(scores[i] <= threshold);
}

/* In which bucket the `rank`-th lowest lies, counted from one; `rank` becomes its rank in there. */
static uint32_t bucket_of(const uint32_t *counts, int64_t *rank) {
    uint32_t bucket = 0;
    while (counts[bucket] < *rank) *rank -= counts[bucket++];
    return bucket;
}

/* The `rank`-th lowest of keys with the same upper eleven bits, which are overwritten; `rank` becomes its rank among the
 * `equal` ones. `counts` has room for all buckets. */
static uint32_t lowest(uint32_t *keys, int64_t size, int64_t *rank, int64_t *equal, uint32_t *counts) {
    uint32_t upper = keys[0] >> 21;
    memset(counts, 0, BUCKETS * 4);
    for (int64_t i = 0; i < size; i++) counts[keys[i] >> 10 & 2047]++;
    uint32_t middle = bucket_of(counts, rank), prefix = upper << 11 | middle;
    int64_t found = 0;
    for (int64_t i = 0; i < size; i++)
        if (keys[i] >> 10 == prefix) keys[found++] = keys[i];
    memset(counts, 0, 1024 * 4);
    for (int64_t i = 0; i < found; i++) counts[keys[i] & 1023]++;
    uint32_t lower = bucket_of(counts, rank);
    *equal = counts[lower];
    return prefix << 10 | lower;
}

/* Of the scores equal to the threshold the first `removed` are not kept. */
static void remove_first(const float *scores, float threshold, int64_t removed, uint8_t *kept) {
    for (int64_t i = 0; removed > 0; i++)
        if (scores[i] == threshold) kept[i] = 0, removed--;
}

/* One row; `counts` has room for all buckets and `keys` for the row. */
static void without_lowest(const float *scores, int64_t size, int64_t removed, uint8_t *kept, uint32_t *counts,
                           uint32_t *keys) {
    int64_t rank = removed, equal;
    memset(counts, 0, BUCKETS * 4);
    count_upper(scores, size, counts);
    uint32_t upper = bucket_of(counts, &rank);
    int64_t inside = counts[upper];
    collect(scores, size, upper, keys, inside);
    uint32_t key = lowest(keys, inside, &rank, &equal, counts);
    if (key == NAN_KEY) {
        memset(kept, 1, size);
        return;
    }
    compare(scores, size, score_of(key), rank < equal, kept);
    if (rank < equal) remove_first(scores, score_of(key), rank, kept);
}

/* The best n of every m neighbours, `groups` of them. A weight gives way to a later one that is not lower and to an
 * earlier one that it is not at least equal to. `scores_of` and `ahead` have room for m times LANES. */
enum { LANES = 32 };
INLINED void best_of(const float *scores, int64_t groups, const int64_t m, int n, uint8_t *kept, float *scores_of,
                     int32_t *ahead) {
    for (int64_t start = 0; start < groups; start += LANES) {
        int64_t count = groups - start < LANES ? groups - start : LANES;
        const float *from = scores + start * m;
        uint8_t *to = kept + start * m;
        if (count == LANES)
            for (int64_t j = 0; j < m; j++)
                for (int64_t g = 0; g < LANES; g++) scores_of[j * LANES + g] = from[g * m + j];
        else
            for (int64_t j = 0; j < m; j++)
                for (int64_t g = 0; g < LANES; g++) scores_of[j * LANES + g] = g < count ? from[g * m + j] : 0;
        memset(ahead, 0, m * LANES * sizeof *ahead);
        for (int64_t j = 1; j < m; j++)
            for (int64_t i = 0; i < j; i++)
                for (int64_t g = 0; g < LANES; g++) {
                    int32_t wins = scores_of[j * LANES + g] >= scores_of[i * LANES + g];
                    ahead[i * LANES + g] += wins;
                    ahead[j * LANES + g] += 1 - wins;
                }
        if (count == LANES)
            for (int64_t g = 0; g < LANES; g++)
                for (int64_t j = 0; j < m; j++) to[g * m + j] = ahead[j * LANES + g] < n;
        else
            for (int64_t g = 0; g < count; g++)
                for (int64_t j = 0; j < m; j++) to[g * m + j] = ahead[j * LANES + g] < n;
    }
}

/* kept [rows][columns]: each row without its `removed` lowest, 1 to columns; 1 where there is no memory. */
int secateur_without_lowest_rows(const float *scores, uint8_t *kept, int64_t rows, int64_t columns, int64_t removed,
                                 int threads) {
    uint32_t *room = malloc((size_t)threads * (BUCKETS + columns) * 4);
    if (!room) return 1;
    EACH_THREAD(uint32_t *counts = room + t * (BUCKETS + columns);
                for (int64_t r = first; r < last; r++)
                    without_lowest(scores + r * columns, columns, removed, kept + r * columns, counts, counts + BUCKETS);)
    free(room);
    return 0;
}

/* kept [rows]: all without the `removed` lowest, 1 to rows; 1 where there is no memory. */
int secateur_without_lowest(const float *scores, uint8_t *kept, int64_t rows, int64_t removed, int threads) {
    uint32_t *counts = calloc((size_t)(threads + 1) * BUCKETS, 4), *all = counts + (size_t)threads * BUCKETS;
    if (!counts) return 1;
    EACH_THREAD(count_upper(scores + first, last - first, counts + t * BUCKETS);)
    for (int t = 0; t < threads; t++)
        for (int b = 0; b < BUCKETS; b++) all[b] += counts[t * BUCKETS + b];
    int64_t rank = removed, equal;
    uint32_t upper = bucket_of(all, &rank);
    int64_t inside = all[upper];
    uint32_t *keys = malloc(inside * 4);
    if (!keys) return free(counts), 1;
    EACH_THREAD(int64_t before = 0;
                for (int u = 0; u < t; u++) before += counts[u * BUCKETS + upper];
                collect(scores + first, last - first, upper, keys + before, counts[t * BUCKETS + upper]);)
    uint32_t key = lowest(keys, inside, &rank, &equal, all);
    free(keys), free(counts);
    if (key == NAN_KEY) {
        memset(kept, 1, rows);
        return 0;
    }
    EACH_THREAD(compare(scores + first, last - first, score_of(key), rank < equal, kept + first);)
    if (rank < equal) remove_first(scores, score_of(key), rank, kept);
    return 0;
}

/* kept [rows][m]: the best n of every m, `rows` groups; 1 where there is no memory. */
int secateur_best_of_groups(const float *scores, uint8_t *kept, int64_t rows, int64_t m, int n, int threads) {
    float *room = malloc((size_t)threads * 2 * m * LANES * 4);
    if (!room) return 1;
    EACH_THREAD(float *scores_of = room + t * 2 * m * LANES;
                int32_t *ahead = (int32_t *)(scores_of + m * LANES);
                const float *from = scores + first * m;
                switch (m) { /* a loop of its own where m is a constant */
                    case 2: best_of(from, last - first, 2, n, kept + first * m, scores_of, ahead); break;
                    case 4: best_of(from, last - first, 4, n, kept + first * m, scores_of, ahead); break;
                    case 8: best_of(from, last - first, 8, n, kept + first * m, scores_of, ahead); break;
                    default: best_of(from, last - first, m, n, kept + first * m, scores_of, ahead);
                })
    free(room);
    return 0;
}
