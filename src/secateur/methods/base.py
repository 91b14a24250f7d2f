"""What a pruning method is: one pure function, and what it needs to know.

SparseGPT picks its mask while it updates the weights, so score, mask and update cannot be three hooks; one
function does it all, and `scored` lifts the easy case of a score alone.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from secateur.patterns import Group, Pattern
from secateur.stats import Stats


class Pruned(NamedTuple):
    """What a method returns for one site: `weight` float32 and `kept` bool, both `[out, in]`.

    `note` says in words what the reader of the report must know, such as a raised damping.
    """

    weight: Tensor
    kept: Tensor
    note: str = ""


class Method(NamedTuple):
    """A pruning method.

    `need` names the statistics it reads (keys of `STATS`); `group` is the comparison group it was published
    with, used where an unstructured pattern leaves it open. `prune(weight, stats, pattern)` is pure: weight
    `[out, in]` float32 is not changed.
    """

    need: frozenset[str]
    group: Group
    prune: Callable[[Tensor, Stats, Pattern], Pruned]
    updates: bool = False


def scored(need: Iterable[str], group: Group, score: Callable[[Tensor, Stats], Tensor]) -> Method:
    """The method that removes the lowest `score(weight, stats)` `[out, in]` and changes no other weight."""

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        kept = pattern.mask(score(weight, stats))
        return Pruned(weight.where(kept, 0.0), kept)

    return Method(frozenset(need), group, prune)
