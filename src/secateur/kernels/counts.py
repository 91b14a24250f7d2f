"""What the numbers of a matrix are, in one pass: zeros, negative zeros, NaN, Inf, and how many of
4, 8 and 16 neighbours in a row are not zero at most.

counts.c does no more than read them; what it has no dtype for, and everything without a compiler,
is counted in torch.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.kernels.library import addresses, best, library

GROUPS = (4, 8, 16)
"""The neighbours that are looked at together."""
BITS = {
    torch.float8_e4m3fn: (0xFF, 0x7F),  # has no Inf
    torch.float8_e5m2: (0x7C, 0x7D),
    torch.float16: (0x7C00, 0x7C01),
    torch.bfloat16: (0x7F80, 0x7F81),
    torch.float32: (0x7F800000, 0x7F800001),
    torch.float64: (0x7FF << 52, (0x7FF << 52) + 1),
}
"""By dtype: the bits of Inf, and the first of NaN."""


class Counts(NamedTuple):
    """The numbers of a matrix `[…, in]`. `densest` is, for each of `GROUPS`, how many of so many
    neighbours are not zero at most; neighbours that are no whole group count nothing.
    """

    zeros: int
    negative_zeros: int
    nans: int
    infs: int
    densest: tuple[int, ...]


def count(weight: Tensor) -> Counts:
    """What the numbers of a floating-point matrix `[…, in]` are."""
    if not weight.numel():
        return Counts(0, 0, 0, 0, (0,) * len(GROUPS))
    compiled = library()
    if compiled is None or weight.dtype not in BITS or weight.device.type != "cpu":
        return count_in_torch(weight)
    rows = weight.reshape(-1, weight.shape[-1]).contiguous()
    counts = (ctypes.c_int64 * 7)()
    bits, threads = BITS[rows.dtype], 1  # whoever has several matrices counts them side by side
    compiled.secateur_count(
        best(), rows.dtype.itemsize, *addresses(rows), *rows.shape, *bits, counts, threads
    )
    zeros, negative, nans, infs, *densest = counts
    return Counts(zeros, negative, nans, infs, tuple(densest))


def count_in_torch(weight: Tensor) -> Counts:
    """What `count` says."""
    weight = weight if weight.dtype.itemsize > 1 else weight.float()
    zero, wide = weight == 0, weight.shape[-1]

    def most(of: int) -> int:
        whole = ~zero[..., : wide // of * of]
        return int(whole.unflatten(-1, (-1, of)).sum(-1).max()) if whole.numel() else 0

    negative = int((zero & weight.signbit()).sum())
    odd = int(weight.isnan().sum()), int(weight.isinf().sum())
    return Counts(int(zero.sum()), negative, *odd, tuple(most(of) for of in GROUPS))
