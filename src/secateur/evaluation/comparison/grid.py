"""Which rows a comparison has: methods × patterns × rules, ranges of patterns, and draws of
calibration text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.data.windows import Windows
from secateur.errors import BadPattern, SecateurError, UnknownName
from secateur.evaluation.results.schema import row_name
from secateur.methods import find_method
from secateur.methods.pattern_text import parse, share_of
from secateur.methods.structures import Structure
from secateur.pruning.check import find_recipe
from secateur.pruning.planning.measured import ALLOCATIONS, check_allocation
from secateur.system.settings import Grid, Recipe

RANGE = re.compile(r"(\d+)%\.\.(\d+)%(?:/(\d+)%)?((?: of [a-z]+)?)")
"""`10%..80%`, in steps of ten; `30%..60%/5%`; either with ` of channels` and the like behind."""

SEARCHED = ("", " of row", " of matrix", " of channels")
"""Families of patterns that have a member at every whole percent."""


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
    """One draw of calibration text. The first is the table's, others say how much hangs on it."""

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
    """The patterns with ranges written out: `10%..30%` is 10%, 20%, 30%. Raises BadPattern."""
    expanded: list[str] = []
    for pattern in patterns:
        if ".." not in pattern:
            expanded.append(pattern)
            continue
        matched = RANGE.fullmatch(pattern.strip())
        if not matched or int(matched[1]) >= int(matched[2]) or int(matched[3] or 1) == 0:
            raise BadPattern(
                f"{pattern!r} is no range of patterns. Say '10%..80%', '30%..60%/5%', or "
                "'10%..40% of channels'."
            )
        first, last, step = int(matched[1]), int(matched[2]), int(matched[3] or 10)
        expanded += [f"{share}%{matched[4]}" for share in range(first, last + 1, step)]
    return list(dict.fromkeys(expanded))


def cells(grid: Grid) -> list[Cell]:
    """Every row: each method with the patterns of its kind, zeros or structures.

    Raises UnknownName or BadPattern for a method that goes with none of the patterns, or a pattern
    with none of the methods; and whatever `find_recipe` raises for the options.
    """
    if not grid.methods or not grid.patterns or not grid.allocate:
        raise BadPattern(
            "A comparison wants at least one method and one pattern, and a rule of allocation."
        )
    rows: list[Cell] = []
    refused: dict[str, SecateurError] = {}
    patterns = {pattern: parse(pattern) for pattern in expand(grid.patterns)}
    for pattern, parsed in patterns.items():
        structure = isinstance(parsed, Structure)
        align = grid.align if structure else None
        uniform = [rule for rule in grid.allocate if rule == "uniform"] if structure else []
        for method in grid.methods:
            recipe = Recipe(method=method, pattern=pattern)
            try:
                find_recipe(recipe)
            except (UnknownName, BadPattern) as error:
                refused[method] = refused[pattern] = error
                continue
            for rule in uniform or grid.allocate:
                find_recipe(replace(recipe, allocate=rule, skip=grid.skip, align=align))
                if rule not in ("uniform", *ALLOCATIONS):
                    check_allocation(rule, str(parsed), files=False)
                rows.append(Cell(method, str(parsed), rule))
    fitting = {name for cell in rows for name in (cell.method, cell.pattern)}
    names = [(name, name) for name in grid.methods]
    names += [(pattern, str(parsed)) for pattern, parsed in patterns.items()]
    for asked, name in names:
        if name not in fitting:
            raise refused[asked]
    return list(dict.fromkeys(rows))


def check_searched(rows: Sequence[Cell]) -> None:
    """Raise BadPattern where no pattern is a share that can be searched for a tolerance."""
    if not any((share := share_of(cell.pattern)) and share[1] in SEARCHED for cell in rows):
        raise BadPattern(
            "A tolerance is searched over shares of weights or channels; add a pattern such as "
            "'50%'."
        )
