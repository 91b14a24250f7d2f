"""Blocks of columns for the sweep, with the Gram matrix behind them."""

import torch
from torch import Tensor

from secateur.methods.column_sweep import responses


def gram_of(columns: int, seed: int = 0) -> Tensor:
    """Of correlated inputs of unequal scale, float64, positive definite."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    scale = torch.randn(columns, generator=draw, dtype=torch.float64).mul(0.5).exp()
    gram = (mix.T @ mix / columns + 0.1 * torch.eye(columns, dtype=torch.float64)) * scale * scale[:, None]
    return (gram + gram.T) / 2


def block_of(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, U and which inputs were used, of a block."""
    draw = torch.Generator().manual_seed(seed)
    alive = torch.rand(width, generator=draw) < 0.9
    return torch.randn(rows, width, generator=draw), responses(gram_of(width, seed), width).float(), alive
