"""Weight matrices that read the same input, solved as one, factorised once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.methods.base import Method, Pruned
from secateur.methods.patterns import Group, Pattern, kind_of
from secateur.methods.statistics import Stats


@dataclass(frozen=True)
class Stacked:
    """Matrices on top of each other, `rows` of each, with a pattern each; chunks must agree."""

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


def solved_together(
    method: Method, names: Iterable[str], stats: Mapping[str, Stats]
) -> list[list[str]]:
    """The weight matrices in order; those with one input together, if `gram` is needed of it."""
    together: dict[object, list[str]] = {}
    for name in names:
        shared = "gram" in method.need and name in stats
        together.setdefault(id(stats[name]) if shared else name, []).append(name)
    return list(together.values())


def prune_together(
    method: Method, weights: Sequence[Tensor], stats: Stats, patterns: Sequence[Pattern]
) -> list[Pruned]:
    """`method.prune` of weights `[out, in]` that read the same input, each to its own pattern.

    Where rows are independent they are solved as one matrix, and factorised once.
    """
    patterns = [pattern.within(method.group) for pattern in patterns]
    if not method.row_wise or len(weights) == 1 or len({pattern.chunk for pattern in patterns}) > 1:
        pairs = zip(weights, patterns, strict=True)
        return [method.prune(weight, stats, pattern) for weight, pattern in pairs]
    rows = tuple(len(weight) for weight in weights)
    pruned = method.prune(torch.cat(list(weights)), stats, Stacked(rows, tuple(patterns)))
    parts = zip(pruned.weight.split(rows), pruned.kept.split(rows), strict=True)
    return [Pruned(weight, kept, pruned.note) for weight, kept in parts]
