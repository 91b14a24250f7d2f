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
        row.rank, row.ties = "", []
        if row.kind == "dense" or not rivals:
            continue
        better = worse = 0
        for rival in rivals:
            _, (low, high) = perplexity_difference(np.asarray(row.loss), np.asarray(rival.loss))
            if low > 0:
                better += 1
            elif high < 0:
                worse += 1
            else:
                row.ties.append(rival.name)
        best, last = better + 1, len(rivals) + 1 - worse
        row.rank = str(best) if best == last else f"{best}-{last} tie"


def alike(one: Row, other: Row) -> bool:
    """Whether two rows are ranked against each other: the same pattern, values as exact, the same
    calibration text.

    A row that needs no calibration stands with those of the first draw; one that was recovered,
    with those that were recovered on the same text.
    """
    return (one.peers, one.calibration or 0) == (other.peers, other.calibration or 0)
