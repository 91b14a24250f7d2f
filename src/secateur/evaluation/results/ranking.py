"""Which row of a comparison is better than which: places are ranges, and ties are called ties."""

from collections.abc import Sequence

import numpy as np

from secateur.evaluation.perplexity import perplexity_difference
from secateur.evaluation.results.schema import Row


def rank(rows: Sequence[Row]) -> None:
    """Fill in `rank` and `ties` of every row but the dense one, among the rows that are `alike`.

    A rank is a range: a row is at best behind those that are better with an interval apart from
    zero, and at worst before those that are worse so.
    """
    for row in rows:
        rivals = [rival for rival in rows if rival is not row and alike(rival, row)]
        row.rank, row.ties = _place(row, [] if row.kind == "dense" else rivals)


def _place(row: Row, rivals: Sequence[Row]) -> tuple[str, list[str]]:
    """The place of a row among its rivals, nothing where it has none, and those it ties with."""
    if not rivals:
        return "", []
    better = worse = 0
    ties: list[str] = []
    for rival in rivals:
        _, (low, high) = perplexity_difference(np.asarray(row.loss), np.asarray(rival.loss))
        if low > 0:
            better += 1
        elif high < 0:
            worse += 1
        else:
            ties.append(rival.name)
    best, last = better + 1, len(rivals) + 1 - worse
    return str(best) if best == last else f"{best}-{last} tie", ties


BAND = 0.03
"""Sizes that differ by no more are equal bytes."""


def rank_at_equal_bytes(rows: Sequence[Row]) -> None:
    """Fill in `byte_rank` and `byte_ties` of the rows whose values are on a grid, among those with
    the same calibration text and within `BAND` of their bytes, whatever their patterns.
    """
    sized = [row for row in rows if row.values != "as stored" and not row.recovered]
    for row in sized:
        rivals = [rival for rival in sized if rival is not row and equal_bytes(rival, row)]
        row.byte_rank, row.byte_ties = _place(row, rivals)


def equal_bytes(one: Row, other: Row) -> bool:
    """Whether two rows have the same calibration text and about the same bytes."""
    same = (one.calibration or 0) == (other.calibration or 0)
    return same and abs(one.disk_bytes / other.disk_bytes - 1) <= BAND


def alike(one: Row, other: Row) -> bool:
    """Whether two rows are ranked against each other: the same pattern, values as exact, the same
    calibration text.

    A row that needs no calibration stands with those of the first draw; one that was recovered,
    with those that were recovered on the same text.
    """
    return (one.peers, one.calibration or 0) == (other.peers, other.calibration or 0)
