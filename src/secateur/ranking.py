"""Which row of a comparison is better than which: places are ranges, and ties are called ties."""

from __future__ import annotations

from typing import Any

from secateur.evaluate import perplexity_difference
from secateur.results import Row


def rank(rows: dict[str, tuple[Row, Any]]) -> None:
    """Fill in `rank` and `ties` of every row but the dense one, among the rows of the same pattern and values.

    `rows` gives each row with its loss per window. A rank is a range: a row is at best behind those that are
    better with an interval apart from zero, and at worst before those that are worse so.
    """
    for row, loss in rows.values():
        rivals = [(r, other) for r, other in rows.values() if _alike(r, row) and r is not row]
        if row.kind == "dense" or not rivals:
            continue
        better = worse = 0
        row.ties = []
        for rival, other in rivals:
            _, (low, high) = perplexity_difference(loss, other)
            if low > 0:
                better += 1
            elif high < 0:
                worse += 1
            else:
                row.ties.append(rival.name)
        best, last = better + 1, len(rivals) + 1 - worse
        row.rank = str(best) if best == last else f"{best}-{last} tie"


def _alike(one: Row, other: Row) -> bool:
    """Whether two rows are ranked against each other: the same pattern, and values as exact."""
    return (one.pattern, one.values) == (other.pattern, other.values)
