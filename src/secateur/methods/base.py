"""What a pruning method is: one pure function, and what it needs to know.

SparseGPT picks its mask while it updates the weights, so score, mask and update cannot be three
hooks; one function does it all, and `scored` lifts the easy case of a score alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.methods.cost import Cost
from secateur.methods.least_squares import Problem
from secateur.methods.patterns import Group, Pattern
from secateur.methods.statistics import Stats


class Pruned(NamedTuple):
    """What a method returns for a weight matrix: `weight` float32 and `kept` bool, `[out, in]`.

    `note` says in words what the reader of the report must know, such as a raised damping.
    """

    weight: Tensor
    kept: Tensor
    note: str = ""


def importance(weight: Tensor, stats: Stats) -> Tensor:
    """What a weight adds to the output, `[out, in]`: |w| · root mean square of its input."""
    return weight.abs().mul_(stats.power().sqrt().to(weight.device))


GridProjection = Callable[[Problem, Tensor, Tensor], Tensor]
"""(problem, weights, kept) → those that are kept on a grid of values, `[out, in]`."""


class Method(NamedTuple):
    """A pruning method.

    `need` names the statistics it reads (keys of `STATS`); `group` is the comparison group it was
    published with, used where an unstructured pattern leaves it open. `prune(weight, stats,
    pattern)` is pure: weight `[out, in]` float32 is not changed. `updates`: it changes the weights
    that it keeps. `row_wise`: rows touch each other through the pattern alone, so matrices that
    read the same input can be solved as one. `cost`: its operations and working memory; None where
    they are not known, and then a run's memory and time are not forecast.

    The rest says what the stream of blocks does for it. `sequential`: inside a block too, the
    inputs of a matrix come from the matrices pruned before it. `permute`: inputs change places
    before an N:M mask is chosen, so that it keeps most of `score`. `refine`: in how many steps, at
    most, each finished block is tuned, and `distil` on about how many tokens all blocks at once
    are, towards what the dense model predicts; with `distil_if_it_fits`, only where that can be
    had, and the report says where it could not. `on_grid`: for a method that can choose mask and
    values together, the method that does, given what makes the projection for a matrix.
    """

    need: frozenset[str]
    group: Group
    prune: Callable[[Tensor, Stats, Pattern], Pruned]
    updates: bool = False
    row_wise: bool = True
    score: Callable[[Tensor, Stats], Tensor] = importance
    sequential: bool = False
    permute: bool = False
    refine: int = 0
    distil: int = 0
    distil_if_it_fits: bool = False
    cost: Cost | None = None
    on_grid: Callable[[Callable[[], GridProjection]], Method] | None = None


def scored(
    need: Iterable[str],
    group: Group,
    score: Callable[[Tensor, Stats], Tensor],
    *,
    row_wise: bool = True,
    cost: Cost | None = None,
) -> Method:
    """Make a method that removes the lowest `score(weight, stats)` and changes no other weight.

    The pruned weights are written over the scores: new memory would cost more than all the rest.
    """

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        weight = weight.detach()
        scores = score(weight, stats)
        kept = pattern.mask(scores)
        own = scores.dtype == weight.dtype and scores.data_ptr() != weight.data_ptr()
        zero, out = weight.new_zeros(()), scores if own else None
        return Pruned(torch.where(kept, weight, zero, out=out), kept)

    return Method(frozenset(need), group, prune, row_wise=row_wise, score=score, cost=cost)
