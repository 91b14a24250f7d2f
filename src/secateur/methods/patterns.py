"""Which weights of a matrix may be removed together: sparsity patterns, and the masks they choose.

A pattern turns scores `[out, in]` into a mask `[out, in]`, True where the weight is kept. Counts
are exact, and among equal scores the weight at the lower position goes first, so a mask never
depends on how a sort treats ties. What takes out whole channels, heads, experts or blocks has no
mask and is in structures.py; `pattern_text` reads either.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from torch import Tensor

from secateur.errors import BadPattern
from secateur.kernels.masks import best_of_groups, crowded, without_lowest

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
        """What columns `start:stop` must hold for the whole matrix to hold this pattern."""
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
    (`check`); a few of its columns may lose everything. Raises BadPattern unless 0 <= ratio <= 1.
    """

    ratio: float
    over: Group | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise self._out_of_range()

    def _out_of_range(self) -> BadPattern:
        share = f"{100 * self.ratio:g}%"
        return BadPattern(
            f"Sparsity is the share removed, at least 0% and under 100%; found {share}."
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
        """Which groups of a matrix `[…, in]` hold over n weights that are not 0, `[…, in / m]`."""
        return crowded(weight, self.n, self.m)

    def holds(self, weight: Tensor) -> bool:
        """Whether a matrix `[…, in]` satisfies the pattern along its inputs."""
        return weight.shape[-1] % self.m == 0 and not bool(self.crowded(weight).any())

    def mask(self, scores: Tensor) -> Tensor:
        return best_of_groups(scores, self.n, self.m)


TWO_OF_FOUR = NM(2, 4)
"""The one N:M pattern that hardware multiplies."""


def kind_of(patterns: Iterable[Pattern]) -> str:
    """The kinds of sparsity among patterns, in one word where there is one."""
    return " + ".join(sorted({pattern.kind for pattern in patterns}))
