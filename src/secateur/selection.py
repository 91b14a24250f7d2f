"""Which channels or heads go: one score for each unit of a site's inputs, and in one case the order of going.

A unit is what leaves together (`units.removable`): one input of the feed-forward's last matrix, or all inputs of the
attention's last matrix that one key-value head feeds. Every selection is a pure function of the weight that reads
them, `[out, in]` float32, the units' inputs `[units, inputs of each]`, and the statistics of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.solve import normalise
from secateur.stats import Stats

ROUNDS = 16
"""In how many rounds `obs` takes channels away; heads go one at a time."""


class Selection(NamedTuple):
    """`need` are keys of `STATS`; `choose(weight, stats, units, count)` gives the units that go, int64 `[count]`."""

    need: frozenset[str]
    choose: Callable[[Tensor, Stats, Tensor, int], Tensor]


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` units with the lowest score, ascending; among equals the earlier."""
    return score.argsort(stable=True)[:count].sort().values


def energy(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """What each unit adds to the output: tr(W_g C_gg W_gᵀ), C = E[x xᵀ]. For one input ‖W_:j‖² E[x_j²]."""
    return _energy(weight, stats.mean("gram").to(weight.device), units)


def fluctuation(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """The same about the mean: Var(x_j) ‖W_:j‖², summed over a unit (FLAP's WIFV, An et al. 2024, arXiv:2312.11983).

    What a unit adds on average costs nothing where a bias can hold it.
    """
    variance = (stats.mean("gram").diagonal() - stats.mean("sum").square()).clamp_min(0).to(weight.device)
    return (weight.square().sum(0) * variance)[units].sum(1)


def _energy(weight: Tensor, gram: Tensor, units: Tensor) -> Tensor:
    if units.shape[1] == 1:
        inputs = units[:, 0]
        return weight[:, inputs].square().sum(0) * gram.diagonal()[inputs]
    parts = [(weight[:, inputs] @ gram[inputs][:, inputs] * weight[:, inputs]).sum() for inputs in units]
    return torch.stack(parts)


def optimal_brain_surgeon(weight: Tensor, stats: Stats, units: Tensor, count: int) -> Tensor:
    """The units that go when the rest makes up for each at once (SlimGPT, Ling et al. 2024, arXiv:2412.18110).

    Removing unit g costs s_g = tr(W_g (H_gg)⁻¹ W_gᵀ) after the best update of the other weights, with H = C_λ⁻¹. The
    cheapest go, the weights and H are updated (a downdate of rank k), and the costs are taken anew: single channels in
    `ROUNDS` rounds, heads one at a time. In the normalised coordinates of solve.py.
    """
    problem = normalise(weight, stats)
    left = problem.weight.clone()
    inverse = torch.linalg.inv(problem.gram)
    gone = torch.zeros(len(units), dtype=torch.bool, device=weight.device)
    rounds = min(ROUNDS, count) if units.shape[1] == 1 else count
    for number in range(rounds):
        step = count * (number + 1) // rounds - count * number // rounds
        cost = _removal_cost(left, inverse, units, gone)
        chosen = lowest(cost, step)
        inputs = units[chosen].flatten()
        column = inverse[:, inputs]
        solved = torch.linalg.solve(inverse[inputs][:, inputs], column.T)  # (H_PP)⁻¹ H_P:
        left -= left[:, inputs] @ solved
        inverse -= column @ solved
        inverse[inputs], inverse[:, inputs] = 0, 0
        inverse[inputs, inputs] = 1
        left[:, inputs] = 0
        gone[chosen] = True
    return gone.nonzero().flatten()


def _removal_cost(weight: Tensor, inverse: Tensor, units: Tensor, gone: Tensor) -> Tensor:
    if units.shape[1] == 1:
        inputs = units[:, 0]
        cost = weight[:, inputs].square().sum(0) / inverse.diagonal()[inputs]
        return cost.masked_fill(gone, torch.inf)
    cost = torch.full((len(units),), torch.inf, device=weight.device)
    for unit in (~gone).nonzero().flatten().tolist():
        inputs = units[unit]
        part = weight[:, inputs]
        cost[unit] = (part.T * torch.linalg.solve(inverse[inputs][:, inputs], part.T)).sum()
    return cost


def by(score: Callable[[Tensor, Stats, Tensor], Tensor]) -> Callable[[Tensor, Stats, Tensor, int], Tensor]:
    """The selection of the units with the lowest `score(weight, stats, units)` `[units]`."""
    return lambda weight, stats, units, count: lowest(score(weight, stats, units), count)


def at_random(weight: Tensor, stats: Stats, units: Tensor) -> Tensor:
    """Any units: what a selection is worth is measured from here. The same ones in every run."""
    draw = torch.Generator().manual_seed(weight.shape[0] + len(units))
    return torch.rand(len(units), generator=draw).to(weight.device)


SELECTIONS: dict[str, Selection] = {
    "random": Selection(frozenset(), by(at_random)),
    "energy": Selection(frozenset({"gram"}), by(energy)),
    "taylor": Selection(frozenset({"taylor"}), by(lambda weight, stats, units: stats.sums["taylor"])),
    "flap": Selection(frozenset({"gram", "sum"}), by(fluctuation)),
    "obs": Selection(frozenset({"gram"}), optimal_brain_surgeon),
}
