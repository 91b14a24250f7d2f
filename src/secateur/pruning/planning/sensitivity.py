"""Trials: the blocks of the dense model pruned at several sparsities, to see what each of them
would lose.

Nothing is written into the model; every block sees the inputs that the dense blocks before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from secateur.errors import BadPlan
from secateur.methods import Method, prune_together
from secateur.methods.patterns import Unstructured
from secateur.methods.statistics import Stats
from secateur.models.matrices import matrix_shapes
from secateur.models.stream.blocks import BlockRun, Step, stream
from secateur.pruning.planning.allocation import Plan

STEPS = (-0.20, -0.15, -0.10, -0.05, 0.0, 0.05, 0.10, 0.15, 0.20)
"""The sparsities that are tried, from the one asked for."""
MOST = 0.95


@dataclass(frozen=True)
class Measuring:
    """What a plan is measured by, on the blocks of a dense model."""

    run: BlockRun
    method: Method
    plan: Plan
    pattern: Unstructured

    @property
    def sparsity(self) -> float:
        """The mean sparsity that is asked for."""
        return self.pattern.ratio

    def at(self, level: float) -> Unstructured:
        """The pattern with another sparsity."""
        return replace(self.pattern, ratio=max(level, 0.0))

    @property
    def blocks(self) -> dict[str, int]:
        """How many weights the plan covers in each block, by its name; blocks without any are left
        out.
        """
        language_model = self.run.language_model
        shapes, found = matrix_shapes(language_model), {}
        for index in range(len(language_model.blocks)):
            start = language_model.block_name(index)
            inside = (shapes[name] for name in self.plan if name.startswith(f"{start}."))
            if size := sum(rows * columns for rows, columns in inside):
                found[start] = size
        return found

    def each(self, what: str, look: Callable[[Step], None]) -> None:
        """`look` at the blocks of the dense model in order, with their inputs; none of them is held
        after that.
        """
        progress, count = self.run.progress, len(self.run.language_model.blocks)
        for step in stream(self.run):
            progress.advance(f"{what} {step.name}", step.index, count)
            look(step)
            del step
        progress.advance(what, count, count)


def levels_around(sparsity: float) -> list[float]:
    """The sparsities to try, rising: the one asked for, and around it what is not below 0 or above
    95 %.

    Raises BadPlan for more than 95 %, where there is nothing to share out.
    """
    if sparsity > MOST:
        raise BadPlan(
            f"Up to {MOST:.0%} can be shared out by measuring; found {sparsity:.1%}. Use --allocate uniform."
        )
    around = [sparsity + step for step in STEPS if step]
    return sorted([sparsity, *(level for level in around if -1e-9 <= level <= MOST + 1e-9)])


def solvable(step: Step, measuring: Measuring) -> Iterator[tuple[list[str], list[Tensor], Stats]]:
    """The sites of a block in the plan: those that share an input, with their weights and its
    statistics.
    """
    together: dict[int, list[str]] = {}
    found = step.observe((measuring.method.need - {"cross"}) | {"gram"}, 0).stats
    for name, stats in found.items():
        if f"{step.name}.{name}" in measuring.plan:
            together.setdefault(id(stats), []).append(name)
    for names in together.values():
        yield names, [step.sites[name].weight.float() for name in names], found[names[0]]


def pruned_at(
    pattern: Unstructured,
    names: Sequence[str],
    weights: Sequence[Tensor],
    stats: Stats,
    method: Method,
) -> Iterator[tuple[str, float, Tensor]]:
    """(site, relative output error, weight) of sites that share an input, pruned to `pattern`."""
    gram = stats.mean("gram")
    found = prune_together(method, weights, stats, [pattern] * len(weights))
    for name, weight, pruned in zip(names, weights, found, strict=True):
        change = weight - pruned.weight
        power = ((weight @ gram) * weight).sum().clamp_min(1e-30)
        yield name, (((change @ gram) * change).sum() / power).item(), pruned.weight
