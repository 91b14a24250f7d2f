"""Reconstruction after whole inputs of a matrix are removed: exact ridge least squares on the
inputs that stay.

One routine for channels, heads and depth. With wanted outputs y and inputs x of which S stay, the
weight that minimises E‖y − V x_S − b‖² with a ridge that pulls to the weights as they were is, for
y = W x,

    V = W_S + W_P C_PS (C_SS + λ diag C_SS)⁻¹        P the inputs that go, C = E[x xᵀ]

since every row has the same inputs, one factorisation serves them all. The same formula does for
other targets: what the dense model gives (y = W x_dense), or what a whole span of blocks adds (y =
W x + δ). Where the matrix has a bias, C is the covariance and the mean goes into the bias, which
contains FLAP's bias compensation (An et al. 2024, arXiv:2312.11983) as the case that leaves V =
W_S.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import NotSolved
from secateur.methods.least_squares import normalise
from secateur.methods.statistics import Stats

NEED = frozenset({"gram", "sum"})
"""The statistics that are read, besides `OF_DENSE` where the target is the dense model."""


class Reconstructed(NamedTuple):
    """`weight` `[out, in]` float32, zero where inputs are removed; `bias` `[out]` or None."""

    weight: Tensor
    bias: Tensor | None


def reconstructed(
    weight: Tensor,
    stats: Stats,
    kept: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
) -> Reconstructed:
    """The best weight `[out, in]` float32 on the inputs `kept`, bool `[in]`, and its bias.

    `added` is E[δ xᵀ] `[out, in]`, with its mean as one more column at the end where there is a
    bias: the target is W x + δ. Raises NotSolved where the Gram matrix cannot be factorised.
    """
    problem = normalise(weight, stats)
    gram, target = problem.gram, problem.target
    mean = output = None
    if added is not None:
        target = target + added[:, : weight.shape[1]] / problem.scale
    if bias is not None:
        mean = stats.mean("sum").to(weight.device)
        dense = stats.mean("dense sum").to(weight.device) if "dense sum" in stats.sums else mean
        output = weight @ dense
        if added is not None:
            output = output + added[:, -1]
        gram = gram - torch.outer(mean / problem.scale, mean / problem.scale)
        target = target - torch.outer(output, mean / problem.scale)
    try:
        inside = gram[kept][:, kept]
        factor = torch.linalg.cholesky(inside)
    except RuntimeError as error:  # LinAlgError is one
        raise NotSolved(
            f"The statistics of {int(kept.sum())} inputs over {stats.tokens} tokens are not "
            "positive definite. Use more calibration samples, or a method without '+repair'."
        ) from error
    solution = torch.zeros_like(weight)
    missing = target[:, kept] - problem.weight[:, kept] @ inside
    solution[:, kept] = problem.weight[:, kept] + torch.cholesky_solve(missing.T, factor).T
    solved = problem.restore(solution, kept.expand_as(weight), weight)
    if bias is None or mean is None or output is None:
        return Reconstructed(solved, None)
    return Reconstructed(solved, bias + output - solved @ mean)
