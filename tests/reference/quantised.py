"""Slow decoders, one weight at a time, from the papers and the published sources of the formats."""

from collections.abc import Sequence

import torch
from torch import Tensor


def block_fp8(weight: Tensor, scales: Tensor, block: int) -> Tensor:
    """`weight_dequant` of DeepSeek-V3 (inference/kernel.py): the last blocks may be cut short."""
    dense = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            dense[i, j] = weight[i, j].float() * scales[i // block, j // block].float()
    return dense


def integers_in_any_order(numbers: Tensor, zeros: Tensor, scales: Tensor, group_of_input: Sequence[int]) -> Tensor:
    """compressed-tensors with act-order, as 0.9 decodes it: every input has the group that it is said to have."""
    dense = torch.empty(numbers.shape, dtype=scales.dtype)
    for i in range(numbers.shape[0]):
        for j, group in enumerate(group_of_input):
            dense[i, j] = (numbers[i, j] - zeros[i, group]).to(scales.dtype) * scales[i, group]
    return dense
