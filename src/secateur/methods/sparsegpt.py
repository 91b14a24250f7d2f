"""SparseGPT (Frantar & Alistarh 2023, alg. 1, arXiv:2301.00774): later columns repair earlier ones.

With H = E[x xᵀ] damped by `damping · mean(diag H)` and U the upper Cholesky factor of H⁻¹ = Uᵀ U, a
weight's score is w² / U_jj², its removal leaves the error w / U_jj, and the later columns absorb it
along row U_j.

Unstructured masks are chosen for `width` columns at a time over all rows, N:M masks when the sweep
reaches a group, both from the weights as updated so far. Departures from the reference code:

* groups of M never straddle the edge of a column block (the block is the largest multiple of M that
  fits);
* counts are exact over the matrix;
* weights on inputs that were always zero are removed first, but not zeroed beyond the pattern, and
  such inputs do not enter the mean of the damping (a constant 1 for them makes the code's result
  depend on the scale of H);
* where the factorisation fails, the damping is raised tenfold, at most three times, and the note
  says so.
"""

from torch import Tensor

from secateur.errors import NotSolved
from secateur.methods.base import Method, Pruned
from secateur.methods.column_sweep import block_width, responses
from secateur.methods.column_sweep import sweep as sweep_columns
from secateur.methods.cost import Cost
from secateur.methods.least_squares import normalise
from secateur.methods.patterns import Pattern
from secateur.methods.statistics import Stats


def sparsegpt(damping: float = 0.01, width: int = 128) -> Method:
    """SparseGPT with relative `damping`, masks chosen for `width` columns at a time."""

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        block = block_width(pattern, width)
        shared = ("responses", damping, block)
        answers, used = stats.once(shared, lambda: _answers(stats, damping, block))
        alive = stats.sums["gram"].diagonal() > 0
        kept, swept = sweep_columns(
            weight, answers.to(weight.device), alive.to(weight.device), pattern, block
        )
        note = "" if used == damping else f"damping raised from {damping:g} to {used:g}"
        return Pruned(swept, kept, note)

    cost = Cost(sweeps=1, factors=1, matrices=3, squares=4, kept=1)
    return Method(frozenset({"gram"}), "matrix", prune, updates=True, cost=cost)


def sweep(width: int = 128) -> Method:
    """SparseGPT's sweep in normalised coordinates, with their damping (least_squares.py)."""

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        problem = normalise(weight, stats)
        block = block_width(pattern, width)
        shared = ("normalised responses", block)
        answers = stats.once(shared, lambda: responses(problem.gram, block)).to(weight.device)
        kept, swept = sweep_columns(problem.weight, answers, problem.alive, pattern, block)
        return Pruned(problem.restore(swept, kept, weight), kept)

    cost = Cost(products=1, sweeps=1, factors=1, matrices=5.5, squares=3, kept=2)
    return Method(frozenset({"gram"}), "matrix", prune, updates=True, cost=cost)


def _answers(stats: Stats, damping: float, block: int) -> tuple[Tensor, float]:
    """The responses at the first of damping × 1, 10, 100, 1000 that works, and that damping."""
    gram = stats.mean("gram")
    for raised in (damping, 10 * damping, 100 * damping, 1000 * damping):
        try:
            return responses(damped(gram, raised), block), raised
        except RuntimeError:  # what torch.linalg.cholesky raises, LinAlgError, is one
            continue
    raise NotSolved(
        f"The input statistics of {len(gram)} channels over {stats.tokens} tokens are not positive "
        f"definite, even with damping {1000 * damping:g}. Use more calibration samples, or method "
        "'wanda'."
    )


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, `[in, in]`.

    Inputs that were always zero do not enter the mean and get it themselves: H may have any scale.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    diagonal[dead] = mean if mean > 0 else 1.0
    diagonal += damping * mean
    return gram
