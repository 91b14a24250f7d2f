"""SparseGPT: prune column by column and let the later columns make up for it (Frantar & Alistarh 2023,
alg. 1, arXiv:2301.00774).

With H = E[x xᵀ] damped by `damping · mean(diag H)` and U the upper Cholesky factor of H⁻¹ = Uᵀ U, a weight's
score is w² / U_jj², its removal leaves the error w / U_jj, and the later columns absorb it along row U_j.

Unstructured masks are chosen for `width` columns at a time over all rows, N:M masks when the sweep reaches a
group, both from the weights as updated so far. Departures from the reference code:

* groups of M never straddle the edge of a column block (the block is the largest multiple of M that fits);
* counts are exact over the matrix;
* weights on inputs that were always zero are removed first, but not zeroed beyond the pattern, and such inputs do
  not enter the mean of the damping (a constant 1 for them makes the code's result depend on the scale of H);
* where the factorisation fails, the damping is raised tenfold, at most three times, and the note says so.
"""

import torch
from torch import Tensor

from secateur.errors import NotSolved
from secateur.methods.base import Method, Pruned
from secateur.patterns import Pattern
from secateur.solve import normalise
from secateur.stats import Stats


def sparsegpt(damping: float = 0.01, width: int = 128) -> Method:
    """SparseGPT with relative `damping` of the mean diagonal, masks chosen for `width` columns at a time."""

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        factor, used = stats.once(("inverse factor", damping), lambda: _factor(stats, damping))
        alive = stats.sums["gram"].diagonal() > 0
        kept, swept = _sweep(weight, factor.to(weight.device), alive.to(weight.device), pattern, width)
        note = "" if used == damping else f"damping raised from {damping:g} to {used:g}"
        return Pruned(swept, kept, note)

    return Method(frozenset({"gram"}), "matrix", prune, updates=True)


def sweep(width: int = 128) -> Method:
    """SparseGPT's sweep in normalised coordinates: the same but for its damping, which is relative (see solve.py)."""

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        problem = normalise(weight, stats)
        factor = stats.once("normalised factor", lambda: _upper_inverse(problem.gram)).to(weight.device)
        kept, swept = _sweep(problem.weight, factor, problem.alive, pattern, width)
        return Pruned(problem.restore(swept, kept, weight), kept)

    return Method(frozenset({"gram"}), "matrix", prune, updates=True)


def _factor(stats: Stats, damping: float) -> tuple[Tensor, float]:
    """The inverse factor at the first of damping × 1, 10, 100, 1000 that works, and that damping."""
    gram = stats.mean("gram")
    for raised in (damping, 10 * damping, 100 * damping, 1000 * damping):
        try:
            return inverse_factor(gram, raised), raised
        except RuntimeError:  # what torch.linalg.cholesky raises, LinAlgError, is one
            continue
    raise NotSolved(
        f"The input statistics of {len(gram)} channels over {stats.tokens} tokens are not positive definite, "
        f"even with damping {1000 * damping:g}. Use more calibration samples, or method 'wanda'."
    )


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U `[in, in]` float32, upper triangular, with Uᵀ U = (H + damping · mean(diag H) · I)⁻¹.

    The mean is over inputs that were not always zero, and the others get it for their diagonal, so the scale of
    H does not matter. Raises torch.linalg.LinAlgError where H is not positive definite.
    """
    damped = gram.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    diagonal[dead] = mean if mean > 0 else 1.0
    diagonal += damping * mean
    return _upper_inverse(damped)


def _upper_inverse(gram: Tensor) -> Tensor:
    """U upper triangular with Uᵀ U = H⁻¹, for H `[in, in]` positive definite.

    With J the reversal of order, J H J = L Lᵀ gives H = A Aᵀ for the upper triangular A = J L J, so U = A⁻¹: one
    factorisation and one triangular inverse, where the reference code takes three steps.
    """
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _sweep(weight: Tensor, factor: Tensor, alive: Tensor, pattern: Pattern, width: int) -> tuple[Tensor, Tensor]:
    """(kept, updated weight): the columns in order, each leaving its error to the later ones.

    Works on the transpose, so that a column is contiguous; errors reach the columns of the same block at once
    and all later blocks in one product at the block's end.
    """
    rows, columns = weight.shape
    chunk = pattern.chunk or width
    width = max(width // chunk, 1) * chunk
    swept = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]; a view may be contiguous already
    kept = torch.empty_like(swept, dtype=torch.bool)
    diagonal = factor.diagonal()
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        errors = torch.empty_like(swept[start:stop])
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            scores = (swept[first:last] / diagonal[first:last, None]).square() * alive[first:last, None]
            kept[first:last] = pattern.columns(rows, first, last).mask(scores.T).T
            for j in range(first, last):
                error = swept[j].where(~kept[j], 0.0) / diagonal[j]
                errors[j - start] = error
                swept[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
        swept[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return kept.T.contiguous(), swept.where(kept, 0.0).T.contiguous()
