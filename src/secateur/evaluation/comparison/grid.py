"""Which rows a comparison has: methods × patterns × rules, ranges of patterns, and draws of
calibration text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.data.windows import Windows
from secateur.errors import BadPattern, SecateurError, UnknownName
from secateur.evaluation.results.schema import row_name
from secateur.methods import find_method
from secateur.methods.pattern_text import parse
from secateur.methods.structures import Structure
from secateur.pruning.check import check_method
from secateur.pruning.planning.measured import ALLOCATIONS, check_allocation
from secateur.system.settings import Grid, Recipe

RANGE = re.compile(r"(\d+)%\.\.(\d+)%(?:/(\d+)%)?((?: of [a-z]+)?)")
"""`10%..80%`, in steps of ten; `30%..60%/5%`; either with ` of channels` and the like behind."""


@dataclass(frozen=True)
class Cell:
    """A row to be made, apart from its calibration text."""

    method: str
    pattern: str
    rule: str

    @property
    def structured(self) -> bool:
        return isinstance(parse(self.pattern), Structure)

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on calibration text; magnitudes do not."""
        if self.structured or self.rule != "uniform":
            return True
        method = find_method(self.method)
        return bool(method.need) or method.sequential or method.refine > 0

    def name(self, values: str = "as stored") -> str:
        return row_name(self.method, self.pattern, self.rule, values)


@dataclass(frozen=True)
class Draw:
    """One draw of calibration text. The first is that of the table; the others tell how much hangs
    on it.
    """

    number: int
    windows: Windows
    corpus: int

    @property
    def label(self) -> str:
        """What the files of its rows are told apart by; nothing for the first."""
        if not self.number:
            return ""
        text = f" text {self.corpus}" if self.corpus else ""
        return f" on {self.windows.ids.shape[0]} samples seed {self.windows.seed}{text}"


def expand(patterns: Sequence[str]) -> list[str]:
    """The patterns with ranges written out: `10%..30%` is 10%, 20% and 30%. Raises BadPattern for
    an odd range.
    """
    found: list[str] = []
    for pattern in patterns:
        if ".." not in pattern:
            found.append(pattern)
            continue
        matched = RANGE.fullmatch(pattern.strip())
        if not matched or int(matched[1]) >= int(matched[2]) or int(matched[3] or 1) == 0:
            raise BadPattern(
                f"{pattern!r} is no range of patterns. Say '10%..80%', '30%..60%/5%', or "
                "'10%..40% of channels'."
            )
        first, last, step = int(matched[1]), int(matched[2]), int(matched[3] or 10)
        found += [f"{share}%{matched[4]}" for share in range(first, last + 1, step)]
    return list(dict.fromkeys(found))


def cells(grid: Grid) -> list[Cell]:
    """Every row: each method with the patterns of its kind, zeros or structures.

    Raises UnknownName or BadPattern for a method that goes with none of the patterns, or a pattern
    with none of the methods; and whatever `check_method` raises for the options.
    """
    methods, allocate = grid.methods, grid.allocate
    if not methods or not grid.patterns or not allocate:
        raise BadPattern(
            "A comparison wants at least one method and one pattern, and a rule of allocation."
        )
    found: list[Cell] = []
    refused: dict[str, SecateurError] = {}
    patterns = expand(grid.patterns)
    for pattern in patterns:
        wanted = parse(pattern)
        for method in methods:
            try:
                check_method(Recipe(method=method, pattern=pattern))
            except (UnknownName, BadPattern) as error:
                refused[method] = refused[pattern] = error
                continue
            structure = isinstance(wanted, Structure)
            rules = (
                [rule for rule in allocate if rule == "uniform"] or allocate
                if structure
                else allocate
            )
            for rule in rules:
                align = grid.align if structure else None
                check_method(
                    Recipe(
                        method=method, pattern=pattern, allocate=rule, skip=grid.skip, align=align
                    )
                )
                if rule not in ("uniform", *ALLOCATIONS):
                    check_allocation(rule, str(wanted), files=False)
                found.append(Cell(method, str(wanted), rule))
    fitting = {cell.method for cell in found} | {cell.pattern for cell in found}
    for asked, named in [*((m, m) for m in methods), *((p, str(parse(p))) for p in patterns)]:
        if named not in fitting:
            raise refused[asked]
    return list(dict.fromkeys(found))
