"""The blocks of the dense model pruned at several sparsities, to see what each of them would lose.

Nothing is written into the model; every block sees the inputs that the dense blocks before it give.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from secateur.errors import BadPlan
from secateur.methods import Method
from secateur.methods.patterns import Unstructured
from secateur.methods.statistics import Stats
from secateur.methods.together import prune_together, solved_together
from secateur.models.matrices import matrix_shapes
from secateur.models.stream.blocks import BlockRun, Step, stream
from secateur.pruning.planning.allocation import Plan

STEPS = (-0.20, -0.15, -0.10, -0.05, 0.0, 0.05, 0.10, 0.15, 0.20)
"""The sparsities that are tried, from the one asked for."""
MOST = 0.95


class Group(NamedTuple):
    """Weights by name, float32 `[out, in]`, that are solved together, and what enters them."""

    weights: dict[str, Tensor]
    stats: Stats


@dataclass(frozen=True)
class Sensitivity:
    """What the blocks of a dense model lose by a method, to plan how `pattern` is shared out.

    `plan` holds the weight matrices that are pruned, all to `pattern` as yet.
    """

    run: BlockRun
    method: Method
    plan: Plan
    pattern: Unstructured

    @property
    def sparsity(self) -> float:
        """The mean sparsity that is asked for."""
        return self.pattern.ratio

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights each matrix of the plan has."""
        shapes = matrix_shapes(self.run.language_model)
        return {name: prod(shapes[name]) for name in self.plan}

    @property
    def blocks(self) -> dict[str, int]:
        """How many weights the plan covers in each block, by its name, where it covers any."""
        sizes, model = self.sizes, self.run.language_model
        names = [model.block_name(index) for index in range(len(model.blocks))]
        covered = {
            block: sum(size for name, size in sizes.items() if name.startswith(f"{block}."))
            for block in names
        }
        return {block: size for block, size in covered.items() if size}

    def each(self, what: str, look: Callable[[Step], None]) -> None:
        """`look` at the blocks of the dense model in order; none of them is held after that."""
        progress, count = self.run.progress, len(self.run.language_model.blocks)
        for step in stream(self.run):
            progress.advance(f"{what} {step.name}", step.index, count)
            look(step)
            del step
        progress.advance(what, count, count)

    def groups(self, step: Step) -> Iterator[Group]:
        """The weight matrices of a block in the plan that saw a token."""
        stats = step.observe((self.method.need - {"cross"}) | {"gram"}, 0).stats
        planned = [name for name in stats if f"{step.name}.{name}" in self.plan]
        for names in solved_together(self.method, planned, stats):
            weights = {name: step.matrices[name].weight.float() for name in names}
            yield Group(weights, stats[names[0]])

    def pruned(self, group: Group, level: float) -> Iterator[tuple[str, float, Tensor]]:
        """(name, relative output error, pruned weight `[out, in]`) of each matrix of a group."""
        pattern = replace(self.pattern, ratio=max(level, 0.0))
        weights, gram = list(group.weights.values()), group.stats.mean("gram")
        solved = prune_together(self.method, weights, group.stats, [pattern] * len(weights))
        for (name, weight), pruned in zip(group.weights.items(), solved, strict=True):
            change = weight - pruned.weight
            power = ((weight @ gram) * weight).sum().clamp_min(1e-30)
            yield name, (((change @ gram) * change).sum() / power).item(), pruned.weight


def levels_around(sparsity: float) -> list[float]:
    """The sparsities to try, rising: the one asked for, and others around it from 0 to 95 %.

    Raises BadPlan for more than 95 %, where there is nothing to share out.
    """
    if sparsity > MOST:
        raise BadPlan(
            f"Up to {MOST:.0%} can be shared out by measuring; found {sparsity:.1%}. "
            "Use --allocate uniform."
        )
    around = [sparsity + step for step in STEPS if step]
    return sorted([sparsity, *(level for level in around if -1e-9 <= level <= MOST + 1e-9)])
