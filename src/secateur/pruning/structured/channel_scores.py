"""Which channels or heads go: one score for each unit of a matrix's inputs, and in one case the
order of going.

A unit is what leaves together (`groups.removable_groups`): one input of the feed-forward's last
matrix, or all inputs of the attention's last matrix that one key-value head feeds. Every selection
is a pure function of the weight that reads them, `[out, in]` float32, the units' inputs `[units,
inputs of each]`, and the statistics of the inputs.

`taylor` scores through gradients: how much a block's output changes, to first order, when one of
its units is removed. With x_g the inputs of a unit and J_g the derivative of the block's output by
them, the score is E‖J_g x_g‖² over tokens. It sees what follows in the block (the feed-forward
after the attention, norms), where `energy` sees the one matrix; for a matrix whose output is simply
added, both are the same. A random projection r of the output gives E (rᵀ J_g x_g)² = ‖J_g x_g‖²
(Hutchinson's estimator), so one backward pass of each batch does. Gradients end at the block's
border, unlike in LLM-Pruner (Ma et al. 2023, arXiv:2305.11627), whose score is of the whole model's
loss.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.methods.least_squares import normalise
from secateur.methods.statistics import Stats
from secateur.models.replay import Call, in_float32, run_block

ROUNDS = 16
"""In how many rounds `obs` takes channels away; heads go one at a time."""


class Selection(NamedTuple):
    """Statistics (`STATS`), and `choose(weight, stats, units, count)`: the units that go, int64."""

    need: frozenset[str]
    choose: Callable[[Tensor, Stats, Tensor, int], Tensor]


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` units with the lowest score, ascending; among equals the earlier."""
    return score.argsort(stable=True)[:count].sort().values


def energy(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """What each unit adds to the output: tr(W_g C_gg W_gᵀ), C = E[x xᵀ]."""
    gram = stats.mean("gram").to(weight.device)
    if units.shape[1] == 1:
        inputs = units[:, 0]
        return weight[:, inputs].square().sum(0) * gram.diagonal()[inputs]
    parts = [
        (weight[:, inputs] @ gram[inputs][:, inputs] * weight[:, inputs]).sum() for inputs in units
    ]
    return torch.stack(parts)


def fluctuation(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """The same about the mean: Var(x_j) ‖W_:j‖², summed over a unit (FLAP's WIFV, An et al. 2024,
    arXiv:2312.11983).

    What a unit adds on average costs nothing where a bias can hold it.
    """
    variance = (stats.mean("gram").diagonal() - stats.mean("sum").square()).clamp_min(0)
    return (weight.square().sum(0) * variance.to(weight.device))[units].sum(1)


def optimal_brain_surgeon(weight: Tensor, stats: Stats, units: Tensor, count: int) -> Tensor:
    """The units that go when the rest makes up for each at once (SlimGPT, Ling et al. 2024,
    arXiv:2412.18110).

    Removing unit g costs s_g = tr(W_g (H_gg)⁻¹ W_gᵀ) after the best update of the other weights,
    with H = C_λ⁻¹. The cheapest go, the weights and H are updated (a downdate of rank k), and the
    costs are taken anew: single channels in `ROUNDS` rounds, heads one at a time. In the normalised
    coordinates of least_squares.py.
    """
    problem = normalise(weight, stats)
    left = problem.weight.clone()
    inverse = torch.linalg.inv(problem.gram)
    removed = torch.zeros(len(units), dtype=torch.bool, device=weight.device)
    rounds = min(ROUNDS, count) if units.shape[1] == 1 else count
    for number in range(rounds):
        step = count * (number + 1) // rounds - count * number // rounds
        cost = _removal_cost(left, inverse, units, removed)
        chosen = lowest(cost, step)
        inputs = units[chosen].flatten()
        column = inverse[:, inputs]
        solved = torch.linalg.solve(inverse[inputs][:, inputs], column.T)  # (H_PP)⁻¹ H_P:
        left -= left[:, inputs] @ solved
        inverse -= column @ solved
        inverse[inputs], inverse[:, inputs] = 0, 0
        inverse[inputs, inputs] = 1
        left[:, inputs] = 0
        removed[chosen] = True
    return removed.nonzero().flatten()


def _removal_cost(weight: Tensor, inverse: Tensor, units: Tensor, removed: Tensor) -> Tensor:
    if units.shape[1] == 1:
        inputs = units[:, 0]
        cost = weight[:, inputs].square().sum(0) / inverse.diagonal()[inputs]
        return cost.masked_fill(removed, torch.inf)
    cost = torch.full((len(units),), torch.inf, device=weight.device)
    for unit in (~removed).nonzero().flatten().tolist():
        inputs = units[unit]
        part = weight[:, inputs]
        cost[unit] = (part.T * torch.linalg.solve(inverse[inputs][:, inputs], part.T)).sum()
    return cost


def by(
    score: Callable[[Tensor, Stats, Tensor], Tensor],
) -> Callable[[Tensor, Stats, Tensor, int], Tensor]:
    """The selection of the units with the lowest `score(weight, stats, units)` `[units]`."""
    return lambda weight, stats, units, count: lowest(score(weight, stats, units), count)


def at_random(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """Any units: what a selection is worth is measured from here. The same ones in every run."""
    draw = torch.Generator().manual_seed(weight.shape[0] + len(units))
    return torch.rand(len(units), generator=draw).to(weight.device)


SELECTIONS: dict[str, Selection] = {
    "random": Selection(frozenset(), by(at_random)),
    "energy": Selection(frozenset({"gram"}), by(energy)),
    "taylor": Selection(
        frozenset({"taylor"}), by(lambda weight, stats, units: stats.sums["taylor"])
    ),
    "flap": Selection(frozenset({"gram", "sum"}), by(fluctuation)),
    "obs": Selection(frozenset({"gram"}), optimal_brain_surgeon),
}


def taylor(
    block: nn.Module,
    consumer: str,
    units: Tensor,
    batches: Iterable[tuple[Tensor, Call]],
    masks: Iterable[Tensor | None] = repeat(None),
) -> Tensor:
    """The score of every unit of a consumer, float64 `[units]`, a sum over tokens.

    `units` are its inputs `[units, inputs of each]`; the block is float32. `masks`: by batch, the
    tokens `[windows, length]` bool whose outputs count; None for all. Only for a module of its own,
    no expert.
    """
    inputs: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs[:] = [args[0].detach().requires_grad_()]
        return (inputs[0], *args[1:])

    draw = torch.Generator().manual_seed(0)
    score = torch.zeros(len(units), dtype=torch.float64)
    with block.get_submodule(consumer).register_forward_pre_hook(catch), torch.enable_grad():
        for (hidden, call), counted in zip(batches, masks, strict=False):
            output = run_block(block, hidden.float(), in_float32(call))
            projection = torch.randn(output.shape, generator=draw).to(output.device)
            if counted is not None:
                projection *= counted.to(output.device)[..., None]
            (gradient,) = torch.autograd.grad(output, inputs[0], projection)
            change = (inputs[0].detach() * gradient).flatten(0, -2)
            change = change[:, units]  # [tokens, units, inputs]
            score += change.sum(-1).double().square().sum(0).cpu()
    return score
