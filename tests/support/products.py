"""2:4 matrices, and whether a product of one is right."""

import torch
from torch import Tensor


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A random 2:4 matrix in which some groups have fewer weights than two; zeros are -0.0 at places."""
    draw = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns // 4, 4, generator=draw)
    weight[weight.abs() < weight.abs().kthvalue(3, -1, keepdim=True).values] *= 0
    weight[:, ::5, 1] = 0
    weight[:, ::7] *= 0
    return weight.view(rows, columns).to(dtype)


def close(got: Tensor, weight: Tensor, x: Tensor) -> bool:
    """Whether a product has the error of float32 sums, compared with float64."""
    wanted = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    return bool(((got.double() - wanted).abs() <= 1e-6 * size + 1e-30).all())
