"""`+swap`: a better mask for weights that stay as they are, by exchanges (SparseSwaps, 2025).

With u the removed part of a row, the row's output error is u H uᵀ. Removing weight q in exchange
for weight p changes it by a_q + b_p − 2 w_q w_p H_qp, with c = u H, a_q = 2 w_q c_q + w_q² H_qq and
b_p = −2 w_p c_p + w_p² H_pp. Each step makes the best exchange of every row, within an N:M group
where the pattern has groups, and stops when none helps; so the error on the calibration tokens
never grows and every count stays. Unstructured exchanges are looked for among the `candidates` best
a and b of a row alone: with more inputs than that, the best pair of all can be missed.

For those who must not touch weights. Where weights may change, `+refit` or `alps` are far better,
and a swapped mask is no better a start for refit than the one it came from.
"""

import torch
from torch import Tensor

from secateur.errors import UnknownName
from secateur.methods.base import Method, Pruned
from secateur.methods.least_squares import Problem, normalise
from secateur.methods.patterns import Pattern
from secateur.methods.statistics import Stats


def swap(method: Method, steps: int = 100, candidates: int = 64) -> Method:
    """The method, then up to `steps` exchanges a row. Raises UnknownName if it changes weights."""
    if method.updates:
        raise UnknownName(
            "refinement 'swap' after a method that changes weights", "swap", ("refit",)
        )

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        pruned = method.prune(weight, stats, pattern)
        problem = normalise(weight, stats)
        kept = pruned.kept.clone()
        for _ in range(steps):
            out, back, change = _best_exchanges(problem, kept, pattern.chunk, candidates)
            rows = (change < 0).nonzero()[:, 0]
            if len(rows) == 0:
                break
            kept[rows, out[rows]] = False
            kept[rows, back[rows]] = True
        return pruned._replace(weight=weight.where(kept, 0.0), kept=kept)

    cost = method.cost and method.cost.followed_by(steps + 1)  # at most: it stops when none helps
    return method._replace(need=method.need | {"gram"}, prune=prune, cost=cost, on_grid=None)


def _best_exchanges(
    problem: Problem, kept: Tensor, chunk: int | None, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(index removed, index restored, change of error) of each row's best exchange."""
    w, gram = problem.weight, problem.gram
    image = w.where(~kept, 0.0) @ gram  # c = u H
    square = w.square() * gram.diagonal()
    removing = (2 * w * image + square).where(kept, torch.inf)
    restoring = (square - 2 * w * image).where(~kept, torch.inf)
    if chunk:
        starts = range(0, len(gram), chunk)
        blocks = torch.stack([gram[i : i + chunk, i : i + chunk] for i in starts])
        a, b, values = (x.unflatten(1, (-1, chunk)) for x in (removing, restoring, w))
        pairs = 2 * values[..., :, None] * values[..., None, :] * blocks
        change = a[..., :, None] + b[..., None, :] - pairs  # [out, in / chunk, chunk, chunk]
        best, position = change.flatten(1).min(1)
        start = position // chunk**2 * chunk
        return start + position % chunk**2 // chunk, start + position % chunk, best
    count = min(candidates, w.shape[1])
    a, out = removing.topk(count, dim=1, largest=False)
    b, back = restoring.topk(count, dim=1, largest=False)
    pairs = gram[out[:, :, None], back[:, None, :]]
    pairs = pairs * w.gather(1, out)[:, :, None] * w.gather(1, back)[:, None, :]
    change = a[:, :, None] + b[:, None, :] - 2 * pairs  # [out, count, count]
    best, position = change.flatten(1).min(1)
    rows = torch.arange(len(w), device=w.device)
    return out[rows, position // count], back[rows, position % count], best
