"""How far each method goes: the largest share at which perplexity stays within a tolerance, found by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.comparison.grid import Cell
from secateur.comparison.results import Row
from secateur.comparison.rows import Ground
from secateur.errors import BadPattern
from secateur.patterns import parse, share_of

MOST = 95
"""Percent; a search ends there."""
SEARCHED = ("", " of row", " of matrix", " of channels")
"""Families of patterns that have a member at every whole percent."""


def find_tolerance(text: str | float | None) -> float | None:
    """The share that `5%` or 0.05 names. Raises BadPattern outside 0 to 1."""
    if text is None:
        return None
    try:
        share = float(text.strip().removesuffix("%")) / 100 if isinstance(text, str) else float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise BadPattern(f"A tolerance is a share of the dense perplexity such as '5%'; found {text!r}.")
    return share


@dataclass(frozen=True)
class Reach:
    """How far a method goes in a family of patterns.

    `pattern` is the largest whole percent whose perplexity is at most `most`, taken by the mean; None where 1 % is too
    much already. `certain`: whether the upper end of its 95 % interval is within as well. `beyond` is the next percent,
    which is too much; None where the search ended at `MOST`.
    """

    method: str
    allocation: str
    pattern: str | None
    perplexity: float | None
    certain: bool
    beyond: str | None
    most: float


def reaches(
    ground: Ground, cells: Sequence[Cell], rows: Sequence[Row], tolerance: float
) -> tuple[list[Reach], list[Row]]:
    """For every method, rule and family of shares in `cells` how far it goes, and the rows that were made to find out.

    Between two percents the perplexity is taken to rise. Rows at hand are used; what a search passed by keeps its
    figures and loses its checkpoint.
    """
    dense = ground.dense_row()
    most = dense.perplexity * (1 + tolerance)
    found, made = [], list[Row]()
    shares = ((cell, share_of(cell.pattern)) for cell in cells)
    for method, rule, of in dict.fromkeys((cell.method, cell.rule, share[1]) for cell, share in shares if share):
        if of not in SEARCHED:
            continue
        known = {percent: row for row in rows if (percent := _percent(row, method, rule, of)) is not None}
        at_hand = set(known)
        low, high = _bisect(ground, Cell(method, of, rule), known, most)
        for percent in known.keys() - at_hand:
            row = known[percent]
            row.searched = percent != low
            if row.searched:
                ground.forget(row)
            ground.store.put(row)
            made.append(row)
        found.append(_reach(Cell(method, of, rule), known.get(low), high, dense, most))
    return found, made


def _bisect(ground: Ground, cell: Cell, known: dict[int, Row], most: float) -> tuple[int, int]:
    """The last percent within `most` (0: the dense model) and the next, which is beyond; adds to `known` what it makes.

    The pattern of `cell` is the end of the family's: "" or " of channels".
    """
    low, high = 0, MOST + 1
    for percent in sorted(known):
        if known[percent].perplexity > most:
            high = percent
            break
        low = percent
    while high - low > 1:
        middle = (low + high) // 2
        at = replace(cell, pattern=str(parse(f"{middle}%{cell.pattern}")))
        known[middle] = ground.row(at, ground.draws[0], searching=True)
        low, high = (middle, high) if known[middle].perplexity <= most else (low, middle)
    return low, high


def _reach(cell: Cell, best: Row | None, beyond: int, dense: Row, most: float) -> Reach:
    following = f"{beyond}%{cell.pattern}" if beyond <= MOST else None
    if best is None:
        return Reach(cell.method, cell.rule, None, None, False, following, most)
    certain = dense.perplexity + best.delta_interval[1] <= most
    return Reach(cell.method, cell.rule, best.pattern, best.perplexity, certain, following, most)


def _percent(row: Row, method: str, rule: str, of: str) -> int | None:
    """The whole percent of a row of a method, rule and family, with values as stored; None for any other row."""
    found = share_of(row.pattern)
    if found is None or (row.method, row.allocation, row.values, found[1]) != (method, rule, "as stored", of):
        return None
    return int(found[0]) if found[0].is_integer() else None
