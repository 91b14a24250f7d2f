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
from secateur.methods.values import AS_STORED, parse_values
from secateur.pruning.check import find_recipe
from secateur.pruning.planning.measured import ALLOCATIONS, check_allocation
from secateur.system.settings import Grid, Recipe

RANGE = re.compile(r"(\d+)%\.\.(\d+)%(?:/(\d+)%)?((?: of [a-z]+)?)")
"""`10%..80%`, in steps of ten; `30%..60%/5%`; either with ` of channels` and the like behind."""

NOTHING = "0%"
"""The pattern that takes out nothing: of it there are rows with other values alone."""

SEARCHED = ("", " of row", " of matrix", " of channels")
"""Families of patterns that have a member at every whole percent."""


@dataclass(frozen=True)
class Cell:
    """A row to be made, apart from its calibration text."""

    method: str
    pattern: str
    rule: str
    values: str = AS_STORED

    @property
    def structured(self) -> bool:
        return isinstance(parse(self.pattern), Structure)

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on calibration text; magnitudes do not."""
        if self.structured or self.rule != "uniform" or self.values != AS_STORED:
            return True
        method = find_method(self.method)
        return bool(method.need) or method.sequential or method.refine + method.distil > 0

    @property
    def name(self) -> str:
        return row_name(self.method, self.pattern, self.rule, self.values)


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
    """Every row: each method with the patterns of its kind, zeros or structures, and each kind of
    values; structures have none, and 0 % with values as stored is the dense model.

    Raises UnknownName or BadPattern for a method that goes with none of the patterns, or a pattern
    with none of the methods; and whatever `find_recipe` raises for the options.
    """
    if not grid.methods or not grid.patterns or not grid.allocate or not grid.values:
        raise BadPattern(
            "A comparison wants at least one method, pattern, rule of allocation and kind of "
            "values."
        )
    kinds = list(dict.fromkeys(str(parse_values(text) or AS_STORED) for text in grid.values))
    rows: list[Cell] = []
    refused: dict[str, SecateurError] = {}
    patterns = {pattern: parse(pattern) for pattern in expand(grid.patterns)}
    for pattern, parsed in patterns.items():
        for method in grid.methods:
            try:
                find_recipe(Recipe(method=method, pattern=pattern))
                rows += _cells_of(grid, method, str(parsed), kinds)
            except (UnknownName, BadPattern) as error:
                refused[method] = refused[pattern] = error
    fitting = {name for cell in rows for name in (cell.method, cell.pattern)}
    names = [(name, name) for name in grid.methods]
    names += [(pattern, str(parsed)) for pattern, parsed in patterns.items()]
    for asked, name in names:
        if name not in fitting:
            raise refused[asked]
    return _without_repeats(rows)


def _cells_of(grid: Grid, method: str, pattern: str, kinds: Sequence[str]) -> list[Cell]:
    """The rows of a method with a pattern: each rule with each kind of values."""
    structure = isinstance(parse(pattern), Structure)
    if structure:
        kinds = [kind for kind in kinds if kind == AS_STORED]
    elif pattern == NOTHING:
        kinds = [kind for kind in kinds if kind != AS_STORED]
        if not kinds:
            raise BadPattern("0% as stored is the dense model. Add --values, such as 'int4'.")
    uniform = [rule for rule in grid.allocate if rule == "uniform"] if structure else []
    align, rows = grid.align if structure else None, list[Cell]()
    for rule in uniform or grid.allocate:
        for kind in kinds:
            recipe = Recipe(method=method, pattern=pattern, allocate=rule, values=kind)
            find_recipe(replace(recipe, skip=grid.skip, align=align))
            if rule not in ("uniform", *ALLOCATIONS):
                check_allocation(rule, pattern, files=False)
            rows.append(Cell(method, pattern, rule, kind))
    return rows


def _without_repeats(rows: Sequence[Cell]) -> list[Cell]:
    """The rows, each once; of those that take out nothing, the first that is quantised so."""
    once: dict[object, Cell] = {}
    for cell in rows:
        key: object = cell
        if cell.pattern == NOTHING:
            method = find_method(cell.method)
            stream = method.sequential, method.refine, method.distil, "cross" in method.need
            key = cell.values, cell.rule, *stream
        once.setdefault(key, cell)
    return list(once.values())


def check_searched(rows: Sequence[Cell]) -> None:
    """Raise BadPattern where no pattern is a share that can be searched for a tolerance."""
    if not any((share := share_of(cell.pattern)) and share[1] in SEARCHED for cell in rows):
        raise BadPattern(
            "A tolerance is searched over shares of weights or channels; add a pattern such as "
            "'50%'."
        )
