"""Which weights stay, given a score for each: exact counts, ties by position, one sort that can be read.

`kept` is True where a weight stays. The lowest scores go first; of two equal scores the one at the lower
row-major position goes first. A count is Python's round(ratio * n), half to even, n an integer: the
product is ratio * (rows * columns), because (ratio * rows) * columns rounds differently
(0.1 of 3 x 15 is 4 one way and 5 the other).
"""

import numpy as np


def drop_lowest(scores, count):
    """Return kept, bool of the shape of `scores`, with exactly `count` entries False.

    Raises ValueError on NaN (it has no place in an order) or a count that is not within 0..size.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    if not 0 <= count <= scores.size:
        raise ValueError(f"cannot drop {count} of {scores.size}")
    flat = [float(score) for score in scores.flatten()]
    order = sorted((score, position) for position, score in enumerate(flat))
    kept = np.ones(scores.size, dtype=bool)
    for _, position in order[:count]:
        kept[position] = False
    return kept.reshape(scores.shape)


def unstructured(scores, ratio, over):
    """Return kept [rows, columns] bool: round(ratio * n) dropped of each row, or of the whole matrix.

    `over` is 'row' or 'matrix'; n is the number of columns, or rows * columns.
    """
    scores = np.asarray(scores, dtype=np.float64)
    rows, columns = scores.shape
    if over == "matrix":
        return drop_lowest(scores, round(ratio * (rows * columns)))
    if over == "row":
        return np.array([drop_lowest(row, round(ratio * columns)) for row in scores])
    raise ValueError(f"over is 'row' or 'matrix', not {over!r}")


def n_of_m(scores, n, m):
    """Return kept [rows, columns] bool: exactly n True in every m consecutive columns of every row.

    Raises ValueError when m does not divide the columns.
    """
    scores = np.asarray(scores, dtype=np.float64)
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{n}:{m} needs columns in groups of {m}; there are {columns}")
    kept = np.zeros((rows, columns), dtype=bool)
    for i in range(rows):
        for start in range(0, columns, m):
            kept[i, start : start + m] = drop_lowest(scores[i, start : start + m], m - n)
    return kept


def zeroed(w, kept):
    """Return w [out, in] float64 with +0.0 where not kept; a kept -0.0 becomes +0.0 too.

    Not w * kept: a negative weight times False is -0.0, and inf times False is NaN.
    """
    return np.where(kept, w, 0.0) + 0.0
