"""`--keep-zeros`: what is zero already stays zero, under any method and pattern.

A method chooses its mask through its pattern alone. So this is a pattern: zeros are removed first,
they count for the pattern, and those beyond it are removed as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.methods.base import Method, Pruned
from secateur.methods.patterns import Group, Pattern
from secateur.methods.statistics import Stats
from secateur.methods.together import prune_together


@dataclass(frozen=True)
class KeepZeros:
    """A pattern of a matrix that holds `zeros` already, bool `[out, in]`."""

    pattern: Pattern
    zeros: Tensor

    @property
    def kind(self) -> str:
        return self.pattern.kind

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    @property
    def chunk(self) -> int | None:
        return self.pattern.chunk

    def within(self, group: Group) -> "KeepZeros":
        return replace(self, pattern=self.pattern.within(group))

    def columns(self, rows: int, start: int, stop: int) -> "KeepZeros":
        pattern = self.pattern.columns(rows, start, stop)
        return replace(self, pattern=pattern, zeros=self.zeros[:, start:stop])

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.pattern.check(shape, name)

    def mask(self, scores: Tensor) -> Tensor:
        lowest = torch.where(self.zeros, scores.amin() - 1, scores)
        return self.pattern.mask(lowest) & ~self.zeros


def prune_keeping_zeros(
    method: Method, weights: Sequence[Tensor], stats: Stats, patterns: Sequence[Pattern]
) -> list[Pruned]:
    """`prune_together`, and what is zero in the weights `[out, in]` is zero in the results.

    An exchange of `+swap` may choose a zero to stay, which `+refit` would fill: it is taken out.
    """
    pairs = zip(patterns, weights, strict=True)
    keeping = [KeepZeros(pattern, weight == 0) for pattern, weight in pairs]
    solved = zip(prune_together(method, weights, stats, keeping), keeping, strict=True)
    return [
        pruned._replace(weight=pruned.weight.masked_fill(pattern.zeros, 0.0))
        for pruned, pattern in solved
    ]
