"""Which weights of a matrix may be removed together: sparsity patterns, and the masks they choose.

A pattern turns scores `[out, in]` into a mask `[out, in]`, True where the weight is kept. Counts
are exact, and among equal scores the weight at the lower position goes first, so a mask never
depends on how a sort treats ties. `parse` reads what `str` writes.

    50%              unstructured; the method chooses the comparison group it was published with
    50% of row       unstructured, the same count in every output row
    50% of matrix    unstructured, compared over the whole matrix
    2:4              keep 2 of every 4 consecutive inputs (NVIDIA's meaning)

What takes out whole channels, heads, experts or blocks has no mask and is in structures.py; `parse`
reads it as well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from secateur.errors import BadPattern
from secateur.kernels.masks import best_of_groups, crowded, without_lowest
from secateur.methods.structures import Structure, parse_structure

Group = Literal["row", "matrix"]


class Pattern(Protocol):
    """What a method asks of a sparsity pattern."""

    @property
    def kind(self) -> str:
        """The kind of sparsity, as tables show it."""
        ...

    @property
    def sparsity(self) -> float:
        """The share of weights removed."""
        ...

    @property
    def chunk(self) -> int | None:
        """How many consecutive inputs are decided together; None where any number will do."""
        ...

    def within(self, group: Group) -> Self:
        """This pattern with the comparison group filled in where it was left open."""
        ...

    def columns(self, rows: int, start: int, stop: int) -> Self:
        """The pattern that columns `start:stop` must hold so that the whole matrix holds this one
        exactly.
        """
        ...

    def check(self, shape: tuple[int, int], name: str) -> None:
        """Raise BadPattern where a matrix `[out, in]` cannot hold this pattern."""
        ...

    def mask(self, scores: Tensor) -> Tensor:
        """The kept weights, bool `[out, in]`, for scores `[out, in]`."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Remove the `ratio` lowest-scored weights of each row, or of the whole matrix.

    `round(ratio * n)` weights are removed from each group of n. A whole matrix keeps something
    (`check`); a few of its columns (`columns`) may lose everything. Raises BadPattern unless 0 <=
    ratio <= 1.
    """

    ratio: float
    over: Group | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise self._out_of_range()

    def _out_of_range(self) -> BadPattern:
        return BadPattern(
            "Sparsity is the share removed, at least 0% and under 100%; found "
            f"{100 * self.ratio:g}%."
        )

    def __str__(self) -> str:
        return f"{100 * self.ratio:.10g}%" + (f" of {self.over}" if self.over else "")

    kind = "unstructured"
    chunk = None

    @property
    def sparsity(self) -> float:
        return self.ratio

    def within(self, group: Group) -> "Unstructured":
        return self if self.over else replace(self, over=group)

    def columns(self, rows: int, start: int, stop: int) -> "Unstructured":
        if self.over == "row":
            rows = 1
        removed = round(self.ratio * (rows * stop)) - round(self.ratio * (rows * start))
        return replace(self, ratio=removed / (rows * (stop - start)))

    def check(self, shape: tuple[int, int], name: str) -> None:
        if self.ratio == 1:
            raise self._out_of_range()

    def mask(self, scores: Tensor) -> Tensor:
        if self.over is None:
            raise AssertionError("the comparison group is open: call within() first")
        flat = scores if self.over == "row" else scores.reshape(1, -1)
        return without_lowest(flat, round(self.ratio * flat.shape[1])).view_as(scores)


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive inputs. Raises BadPattern unless 0 < n < m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise BadPattern(f"N:M keeps N of every M inputs, 0 < N < M; found {self}.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    kind = "semi-structured"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def chunk(self) -> int:
        return self.m

    def within(self, group: Group) -> "NM":
        return self

    def columns(self, rows: int, start: int, stop: int) -> "NM":
        if start % self.m or stop % self.m:
            raise AssertionError(f"columns {start}:{stop} cut a group of {self.m}")
        return self

    def check(self, shape: tuple[int, int], name: str) -> None:
        if shape[1] % self.m:
            raise BadPattern(
                f"{self} needs inputs in groups of {self.m}; {name} has {shape[1]}. Leave it out "
                f"with --skip '*{name.rsplit('.', 1)[-1]}' or use '{100 * self.sparsity:g}%'."
            )

    def crowded(self, weight: Tensor) -> Tensor:
        """Which groups of a matrix `[…, in]` hold more than n weights that are not zero: bool `[…,
        in / m]`.

        The inputs must be whole groups.
        """
        return crowded(weight, self.n, self.m)

    def holds(self, weight: Tensor) -> bool:
        """Whether a matrix `[…, in]` satisfies the pattern along its inputs."""
        return weight.shape[-1] % self.m == 0 and not bool(self.crowded(weight).any())

    def mask(self, scores: Tensor) -> Tensor:
        return best_of_groups(scores, self.n, self.m)


TWO_OF_FOUR = NM(2, 4)
"""The one N:M pattern that hardware multiplies."""


@dataclass(frozen=True)
class Stacked:
    """Several matrices on top of each other, `rows` of each, every one to its own pattern; chunks
    must agree.
    """

    rows: tuple[int, ...]
    parts: tuple[Pattern, ...]

    @property
    def kind(self) -> str:
        return kind_of(self.parts)

    @property
    def sparsity(self) -> float:
        removed = (r * p.sparsity for r, p in zip(self.rows, self.parts, strict=True))
        return sum(removed) / sum(self.rows)

    @property
    def chunk(self) -> int | None:
        return self.parts[0].chunk

    def within(self, group: Group) -> "Stacked":
        return replace(self, parts=tuple(part.within(group) for part in self.parts))

    def columns(self, rows: int, start: int, stop: int) -> "Stacked":
        parts = zip(self.parts, self.rows, strict=True)
        return replace(self, parts=tuple(part.columns(count, start, stop) for part, count in parts))

    def check(self, shape: tuple[int, int], name: str) -> None:
        for part, rows in zip(self.parts, self.rows, strict=True):
            part.check((rows, shape[1]), name)

    def mask(self, scores: Tensor) -> Tensor:
        stacked = zip(self.parts, scores.split(self.rows), strict=True)
        return torch.cat([part.mask(rows) for part, rows in stacked])


def kind_of(patterns: Iterable[Pattern]) -> str:
    """The kinds of sparsity among patterns, in one word where there is one."""
    return " + ".join(sorted({pattern.kind for pattern in patterns}))


def parse(text: str) -> Pattern | Structure:
    """The pattern or structure that `text` names. Raises BadPattern for anything else."""
    return parse_structure(text.strip()) or parse_pattern(text)


def parse_pattern(text: str) -> Pattern:
    """The pattern of zeros that `text` names. Raises BadPattern for anything else, structures
    too.
    """
    if match := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip()):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(-?\d+(?:\.\d+)?)%(?: of (row|matrix))?", text.strip()):
        over: Group | None = match[2]  # type: ignore[assignment]
        pattern = Unstructured(float(match[1]) / 100, over)
        pattern.check((1, 1), text)
        return pattern
    if parse_structure(text.strip()):
        raise BadPattern(
            f"{text} takes out whole structures, which need no plan; a pattern of zeros is wanted "
            "here, such as '50%' or '2:4'. Structures go to 'secateur prune' as they are."
        )
    raise BadPattern(
        f"{text!r} is no sparsity pattern. Say '50%', '50% of row', '50% of matrix', 'N:M' such as "
        "'2:4', '25% of channels', '25% of heads', '25% of experts', '4 blocks', '12% of blocks', "
        "or 'to 75% of parameters'."
    )


def share_of(text: str) -> tuple[float, str] | None:
    """The share in percent that a pattern takes out and of what: "" for single weights, " of
    channels" …

    None for a pattern that is no share. Patterns with the same end are one family, whose members
    have an order.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%((?: of [a-z]+)?)", text)
    return (float(match[1]), match[2]) if match else None
