"""The Triton kernel of kernels/sweep.py, apart from it because Triton may be missing.

A program takes a few rows through all columns of a block, with their weights in registers all the
while. A column cannot be taken out of registers by its number, so it is summed out of the row: as
many operations as taking up its error.
"""

# pyright: reportGeneralTypeIssues=false
# Triton's ranges are compiled, never iterated.

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def sweep_rows(
    values,
    kept,
    inverse,
    alive,
    rows,
    width,
    row_stride,
    column_stride,
    m,
    n,
    choose: tl.constexpr,
    rows_at_once: tl.constexpr,
    columns: tl.constexpr,
):
    """values [rows, width] float32 and kept [rows, width] uint8; inverse [width, width], alive
    [width] float32.

    With `choose` the best n of every m are kept and written, otherwise kept is read. `columns` is a
    power of two, at least `width`.
    """
    row = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    column = tl.arange(0, columns)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    weights = tl.load(values + at, inside, 0.0)
    diagonal = tl.load(inverse + column * (row_stride + column_stride), column < width, 1.0)
    usable = tl.load(alive + column, column < width, 0.0)
    stays = (
        tl.load(kept + at, inside, 0).to(tl.int32)
        if not choose
        else tl.zeros((rows_at_once, columns), tl.int32)
    )
    for first in range(0, width, m):
        last = tl.minimum(first + m, width)
        ratio = tl.div_rn(weights, tl.broadcast_to(diagonal[None, :], (rows_at_once, columns)))
        scores = ratio * ratio * usable[None, :]
        for j in range(first, last):
            is_column = column[None, :] == j
            if choose:
                score = tl.expand_dims(tl.sum(tl.where(is_column, scores, 0.0), 1), 1)
                later = (column[None, :] > j) & (column[None, :] < last) & (scores >= score)
                earlier = (column[None, :] >= first) & (column[None, :] < j) & ~(score >= scores)
                ahead = tl.sum((later | earlier).to(tl.int32), 1)
                stays = tl.where(is_column & (tl.expand_dims(ahead, 1) < n), 1, stays)
            leaves = is_column & (stays == 0)
            pivot = tl.load(inverse + j * (row_stride + column_stride))
            gone = tl.sum(tl.where(leaves, weights, 0.0), 1)
            error = tl.div_rn(gone, tl.broadcast_to(pivot, (rows_at_once,)))
            answer = tl.load(
                inverse + j * row_stride + column * column_stride,
                (column > j) & (column < width),
                0.0,
            )
            weights -= error[:, None] * answer[None, :]
    tl.store(values + at, tl.where(stays != 0, weights, 0.0), inside)
    if choose:
        tl.store(kept + at, stays.to(tl.uint8), inside)
