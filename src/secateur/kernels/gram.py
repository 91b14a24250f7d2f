"""Sums over tokens of products of what enters a layer: products float32, sums float64.

A Gram matrix XᵀX is symmetric, so half of it is computed; and of bfloat16 inputs the products are
exact in float32, so nothing is lost by multiplying them as they are. gram.c does both on a CPU, and
torch does neither there.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from secateur.kernels.library import addresses, best, isa, library

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of inputs that gram.c reads, as it calls them."""
TOKENS_AT_A_TIME = 4096
"""Whose columns gram.c copies next to each other: CHUNK there."""
SHORT = 512
"""Tokens whose squares are added in float32, as in gram.c."""


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right: `[tokens, in]` of one dtype, `[in, in]` float64, on one device."""
    compiled, failed = _compiled(total, left, right), True
    if compiled:
        same, left = left is right, left.contiguous()
        right = left if same else right.contiguous()
        places, threads = addresses(left, right, total), torch.get_num_threads()
        kind = KINDS[left.dtype]
        failed = compiled.secateur_add_products(best(), kind, *places, *left.shape, threads)
    if failed:
        total.add_(products_in_torch(left, right))


def add_squares(total: Tensor, x: Tensor) -> None:
    """total += the squares of inputs x `[tokens, in]`, total `[in]` float64."""
    if compiled := _compiled(total, x):
        x = x.contiguous()
        kind, places, threads = KINDS[x.dtype], addresses(x, total), torch.get_num_threads()
        compiled.secateur_add_squares(best(), kind, *places, *x.shape, threads)
    else:
        total.add_(summed(x.float().square()))


def products_in_torch(left: Tensor, right: Tensor) -> Tensor:
    """What `add_products` adds, float32."""
    if left.is_cuda and left.dtype != torch.float32:  # exact products, float32 sums
        return torch.mm(left.T, right, out_dtype=torch.float32)
    wide = left.float()
    return wide.T @ (wide if left is right else right.float())


def panel_width(dtype: torch.dtype) -> int | None:
    """Bytes of an input in what gram.c copies; None where torch makes the products."""
    if library() is None or dtype not in KINDS:
        return None
    return 2 if dtype == torch.bfloat16 and isa() == "avx512_bf16" else 4


def summed(x: Tensor) -> Tensor:
    """The sum of float32 x `[tokens, in]` over tokens, `SHORT` at a time, float64 over these."""
    return torch.stack([part.sum(0) for part in x.split(SHORT)]).double().sum(0)


def _compiled(total: Tensor, *inputs: Tensor) -> CDLL | None:
    """The library where there is one and gram.c takes these."""
    plain = inputs[0].dtype in KINDS and total.is_contiguous()
    same = all(x.device.type == "cpu" and x.dtype == inputs[0].dtype for x in inputs)
    return library() if plain and same else None
