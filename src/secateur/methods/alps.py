"""ALPS: the mask and the weights together, by ADMM on the l0 or N:M constraint (Meng et al. 2024,
arXiv:2406.07831), then a refit on that mask.

ADMM alternates a ridge solution X, which ignores the mask, with a projection D of X + V/ρ onto the
pattern; the multiplier V and a growing penalty ρ pull the two together until the support stands
still. Departures: ρ runs through a fixed geometric series, a few updates at each, with one Cholesky
factorisation a stage in float32; the paper adapts ρ to the change of support and uses one float64
eigendecomposition. Coordinates are normalised before damping, not after.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from secateur.methods.base import GridProjection, Method, Pruned
from secateur.methods.cost import Cost, refit_products
from secateur.methods.least_squares import Problem, masked_least_squares, normalise
from secateur.methods.patterns import Pattern
from secateur.methods.statistics import Stats


def alps(
    stages: int = 16,
    updates: int = 2,
    first: float = 0.05,
    last: float = 5.0,
    iterations: int = 10,
    grid: Callable[[], GridProjection] | None = None,
) -> Method:
    """ADMM with penalties from `first` to `last`, `updates` at each, then `iterations` of refit.

    `grid` makes for every matrix what rounds the weights that the pattern lets stay, so that the
    mask is chosen together with the values.
    """

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        problem = normalise(weight, stats)
        penalties = torch.logspace(0, 1, stages, last / first) * first
        kept, free = _admm(problem, pattern, penalties, updates, grid() if grid else None)
        solution = masked_least_squares(problem, kept, free, iterations)
        return Pruned(problem.restore(solution, kept, weight), kept)

    products = stages * updates + refit_products(iterations)
    cost = Cost(products=products, inverses=stages, matrices=12, squares=3, kept=1)
    on_grid = partial(alps, stages, updates, first, last, iterations)
    need = frozenset({"gram"})
    return Method(need, "matrix", prune, updates=True, cost=cost, on_grid=on_grid)


def _admm(
    problem: Problem,
    pattern: Pattern,
    penalties: Tensor,
    updates: int,
    on_grid: GridProjection | None,
) -> tuple[Tensor, Tensor]:
    """(kept, weights in normalised coordinates, not yet zero off the mask)."""
    kept = pattern.mask(problem.weight.abs())
    sparse = problem.weight.where(kept, 0.0)
    multiplier = torch.zeros_like(sparse)  # unscaled, so that it survives a change of ρ
    free = problem.weight
    penalty = 1.0
    for penalty in penalties.tolist():
        shifted = problem.gram.clone()
        shifted.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        for _ in range(updates):
            free = (problem.target - multiplier + penalty * sparse) @ inverse
            moved = free + multiplier / penalty
            kept = pattern.mask(moved.abs())
            sparse = on_grid(problem, moved * kept, kept) if on_grid else moved * kept
            multiplier = penalty * (moved - sparse)  # V + ρ (X − D): what the projection took off
    kept = pattern.mask((free + multiplier / penalty).abs())
    return kept, free
