"""How far each method goes: the largest share at which perplexity stays within a tolerance, found
by bisection.
"""

from collections.abc import Sequence
from dataclasses import replace

from secateur.errors import BadPattern, BadPlan
from secateur.evaluation.comparison.grid import SEARCHED, Cell
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row, ToleranceResult
from secateur.methods.pattern_text import parse, share_of
from secateur.methods.values import AS_STORED

MOST = 95
"""Percent; a search ends there."""


def search_tolerance(
    context: ComparisonContext, cells: Sequence[Cell], rows: Sequence[Row], tolerance: float
) -> tuple[list[ToleranceResult], list[Row]]:
    """For every method, rule and family of shares in `cells` how far it goes with values as stored,
    and the rows that were made to find out.

    Between two percents the perplexity is taken to rise. Rows at hand are used; what a search
    passed by keeps its figures and loses its checkpoint.
    """
    dense = context.dense_row()
    most = dense.perplexity * (1 + tolerance)
    reached, made = list[ToleranceResult](), list[Row]()
    plain = (cell for cell in cells if cell.values == AS_STORED)
    shares = ((cell, share_of(cell.pattern)) for cell in plain)
    families = (replace(cell, pattern=share[1]) for cell, share in shares if share)
    for family in dict.fromkeys(families):
        if family.pattern not in SEARCHED:
            continue
        known = {percent: row for row in rows if (percent := _percent(row, family)) is not None}
        at_hand = set(known)
        low, high, note = _bisect(context, family, known, most)
        best = max((percent for percent in known if percent <= low), default=None)
        for percent in known.keys() - at_hand:
            row = known[percent]
            if percent == best:
                row = known[percent] = context.row(_at(family, percent), context.draws[0])
            elif row.searched:
                context.forget(row)
            made.append(row if percent == best else replace(row, searched=True))
        row = None if best is None else known[best]
        certain = row is not None and dense.perplexity + row.delta_interval[1] <= most
        reached.append(
            ToleranceResult(
                family.method,
                family.rule,
                row and row.pattern,
                row and row.perplexity,
                certain,
                f"{high}%{family.pattern}" if high != MOST + 1 else None,
                most,
                note,
            )
        )
    return reached, made


def _at(family: Cell, percent: int) -> Cell:
    """The member of a family at a percent; its `pattern` is what follows that: " of channels"."""
    return replace(family, pattern=str(parse(f"{percent}%{family.pattern}")))


def _bisect(
    context: ComparisonContext, family: Cell, known: dict[int, Row], most: float
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
            known[middle] = context.row(_at(family, middle), context.draws[0], searching=True)
        except (BadPattern, BadPlan) as error:
            if any(percent > middle for percent in known):
                low = middle
            else:
                high, note = middle, str(error)
            continue
        low, high = (middle, high) if known[middle].perplexity <= most else (low, middle)
    return low, high, note if high not in known else ""


def _percent(row: Row, family: Cell) -> int | None:
    """The whole percent of a row of a family, with values as stored; None for any other row."""
    share = share_of(row.pattern)
    plain = row.values == AS_STORED and row.recovered is None
    alike = share and Cell(row.method, share[1], row.allocation) == family
    return int(share[0]) if share and alike and plain and share[0].is_integer() else None
