"""The best weights on a fixed mask: ridge least squares on the inputs that a weight matrix saw.

The output error is ‖(W − V) X‖² = tr (W − V) H (W − V)ᵀ with H the Gram matrix of its inputs.
Channels of language models differ in scale by orders of magnitude, so everything is done in
normalised coordinates: with d_j = √H_jj the weights are T = W·d, and H becomes a matrix with unit
diagonal. There the Wanda score is |T|, the Jacobi preconditioner is the identity, and damping is
relative: λ added to the unit diagonal is λ·diag H in the original coordinates. The published
damping, λ·mean(diag H), swamps ordinary channels when a few are massive.

The ridge pulls to the dense weights, never to zero: it stands in the target too. Solvers take the
target B = T·H, not T, so that a target made of dense inputs, B = W·E[x_dense xᵀ], is the same code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.methods.statistics import Stats


class Problem(NamedTuple):
    """Least squares for one weight matrix in normalised coordinates.

    `weight` T `[out, in]`, `gram` `[in, in]` with diagonal 1 + λ, `target` B `[out, in]` (its
    solution without a mask is what `weight` would become), `scale` d `[in]`, `alive` `[in]`: which
    inputs any token used. All float32.
    """

    weight: Tensor
    gram: Tensor
    target: Tensor
    scale: Tensor
    alive: Tensor

    def restore(self, solution: Tensor, kept: Tensor, dense: Tensor) -> Tensor:
        """A solution in the original coordinates, 0 off the mask; dead inputs stay dense."""
        return torch.where(self.alive, solution / self.scale, dense).where(kept, 0.0)


def ridge(stats: Stats) -> float:
    """The relative damping λ: 0.01, growing to 0.1 with fewer than 32 tokens for each channel."""
    tokens_per_channel = stats.tokens / len(stats.sums["gram"])
    return min(max(0.01 * 32 / max(tokens_per_channel, 1e-9), 0.01), 0.1)


def normalise(weight: Tensor, stats: Stats, *, own_inputs: bool = False) -> Problem:
    """The least-squares problem of a weight `[out, in]` float32: to give what it gives on dense
    inputs, where these were seen and its `own_inputs` are not asked for, else on its own.
    """
    damping = ridge(stats)
    shared = stats.once("normalised", lambda: _normalised(stats, damping))
    gram, scale, alive = (tensor.to(weight.device) for tensor in shared)
    scaled = weight * scale * alive
    if "cross" in stats.sums and not own_inputs:
        # what the dense model gives: W E[x_dense xᵀ], with the ridge to W as before
        cross = stats.mean("cross").to(weight.device)
        target = (weight @ cross / scale + damping * scaled) * alive
    else:
        target = scaled @ gram
    return Problem(scaled, gram, target, scale, alive)


def _normalised(stats: Stats, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    gram = stats.mean("gram")
    alive = gram.diagonal() > 0
    scale = gram.diagonal().clamp_min(0).sqrt().where(alive, 1.0)
    gram = gram / scale / scale[:, None]
    gram.fill_diagonal_(1.0 + damping)
    return gram, scale, alive


def masked_least_squares(problem: Problem, kept: Tensor, start: Tensor, iterations: int) -> Tensor:
    """The solution `[out, in]` on the mask `kept` after some conjugate gradient steps from `start`.

    All rows at once: each has its own step lengths, and one product `[out, in] × [in, in]` an
    iteration serves them all (Meng et al. 2024, sec. 3.3, arXiv:2406.07831). The row objective
    falls with every step in exact arithmetic, so a row whose objective did not fall keeps its
    start: never worse than what came in.
    """
    start = start.where(kept, 0.0)
    solution = start.clone()
    image = start @ problem.gram
    before = objective(problem, start, image)
    residual = (problem.target - image) * kept  # `*`: a third of the time of `where` on a processor
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    enough, tiny = 1e-12 * size, torch.finfo(size.dtype).tiny
    for _ in range(iterations):
        image = direction @ problem.gram
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        step = step.where(size > enough, 0.0)
        solution += step * direction
        residual -= step * (image * kept)
        previous, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + direction * (size / previous.clamp_min(tiny))
    worse = ~(objective(problem, solution) <= before)
    return start.where(worse[:, None], solution)


def objective(problem: Problem, solution: Tensor, image: Tensor | None = None) -> Tensor:
    """½ x H xᵀ − B xᵀ of every row x of `solution`: its output error up to a constant, `[out]`.

    `image` is the solution times H, where that is known.
    """
    image = solution @ problem.gram if image is None else image
    return ((0.5 * image - problem.target) * solution).sum(1)
