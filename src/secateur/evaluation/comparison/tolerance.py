"""How far each method goes: the largest share at which perplexity stays within a tolerance, found
by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.errors import BadPattern, BadPlan
from secateur.evaluation.comparison.grid import Cell
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row
from secateur.methods.pattern_text import parse, share_of

MOST = 95
"""Percent; a search ends there."""
SEARCHED = ("", " of row", " of matrix", " of channels")
"""Families of patterns that have a member at every whole percent."""


def check_searched(cells: Sequence[Cell]) -> None:
    """Raise BadPattern where no pattern of a grid is a share that can be searched for a
    tolerance.
    """
    if not any((share := share_of(cell.pattern)) and share[1] in SEARCHED for cell in cells):
        raise BadPattern(
            "A tolerance is searched over shares of weights or channels; add a pattern such as "
            "'50%'."
        )


@dataclass(frozen=True)
class Reach:
    """How far a method goes in a family of patterns.

    `pattern` is the largest whole percent before the first whose perplexity is above `most`, taken
    by the estimate; None where the least that can go is too much. `certain`: whether the upper end
    of its 95 % interval is within too. `beyond` is that first percent; None where the search ended
    at `MOST`. `note`: why `beyond` cannot be had at all.
    """

    method: str
    allocation: str
    pattern: str | None
    perplexity: float | None
    certain: bool
    beyond: str | None
    most: float
    note: str = ""


def reaches(
    ground: ComparisonContext, cells: Sequence[Cell], rows: Sequence[Row], tolerance: float
) -> tuple[list[Reach], list[Row]]:
    """For every method, rule and family of shares in `cells` how far it goes, and the rows that
    were made to find out.

    Between two percents the perplexity is taken to rise. Rows at hand are used; what a search
    passed by keeps its figures and loses its checkpoint.
    """
    dense = ground.dense_row()
    most = dense.perplexity * (1 + tolerance)
    found, made = [], list[Row]()
    shares = ((cell, share_of(cell.pattern)) for cell in cells)
    for method, rule, of in dict.fromkeys(
        (cell.method, cell.rule, share[1]) for cell, share in shares if share
    ):
        if of not in SEARCHED:
            continue
        known = {
            percent: row for row in rows if (percent := _percent(row, method, rule, of)) is not None
        }
        at_hand, cell = set(known), Cell(method, of, rule)
        low, high, note = _bisect(ground, cell, known, most)
        best = max((percent for percent in known if percent <= low), default=None)
        for percent in known.keys() - at_hand:
            if percent == best:
                known[percent] = ground.row(_at(cell, percent), ground.draws[0])
            elif known[percent].searched:
                ground.forget(known[percent])
            made.append(
                known[percent] if percent == best else replace(known[percent], searched=True)
            )
        found.append(_reach(cell, None if best is None else known[best], high, dense, most, note))
    return found, made


def _at(cell: Cell, percent: int) -> Cell:
    """The member of a family at a percent; the pattern of `cell` is the family's end: "" or " of
    channels".
    """
    return replace(cell, pattern=str(parse(f"{percent}%{cell.pattern}")))


def _bisect(
    ground: ComparisonContext, cell: Cell, known: dict[int, Row], most: float
) -> tuple[int, int, str]:
    """The last percent within `most` (0: the dense model), the next, which is beyond, and why there
    is no next.

    Adds to `known` what it makes. A percent that is refused is within below those that can be had,
    else beyond.
    """
    low, high, note = 0, MOST + 1, ""
    for percent in sorted(known):
        if known[percent].perplexity > most:
            high = percent
            break
        low = percent
    while high - low > 1:
        middle = (low + high) // 2
        try:
            known[middle] = ground.row(_at(cell, middle), ground.draws[0], searching=True)
        except (BadPattern, BadPlan) as error:
            if any(percent > middle for percent in known):
                low = middle
            else:
                high, note = middle, str(error)
            continue
        low, high = (middle, high) if known[middle].perplexity <= most else (low, middle)
    return low, high, note if high not in known else ""


def _reach(cell: Cell, best: Row | None, beyond: int, dense: Row, most: float, note: str) -> Reach:
    following = f"{beyond}%{cell.pattern}" if beyond != MOST + 1 else None
    if best is None:
        return Reach(cell.method, cell.rule, None, None, False, following, most, note)
    certain = dense.perplexity + best.delta_interval[1] <= most
    return Reach(
        cell.method, cell.rule, best.pattern, best.perplexity, certain, following, most, note
    )


def _percent(row: Row, method: str, rule: str, of: str) -> int | None:
    """The whole percent of a row of a method, rule and family, with values as stored; None for any
    other row.
    """
    found = share_of(row.pattern)
    same = (row.method, row.allocation, row.values, row.recovered) == (
        method,
        rule,
        "as stored",
        None,
    )
    if found is None or not same or found[1] != of:
        return None
    return int(found[0]) if found[0].is_integer() else None
