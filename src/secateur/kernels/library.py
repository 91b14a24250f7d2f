"""The C library that is compiled with the package where there is a compiler.

A plain C library in the clothes of an extension: no Python and no torch in it, so one build serves
every version of both. Everything in it has a slower equal in torch, for where there is no compiler.
"""

import ctypes
from functools import cache
from importlib.util import find_spec

from torch import Tensor

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
PACKED_KINDS = ("f32", "bf16", "i8", "levels")
"""The values of packed matrices, as packed.c and packed_levels.c call them."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None where the package was installed without a compiler."""
    spec = find_spec("secateur.kernels._native")
    return declared(ctypes.CDLL(spec.origin)) if spec and spec.origin else None


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """A compiled library whose functions know their arguments."""
    whole, size, place = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    for kind in PACKED_KINDS:
        beside = {"i8": 1, "levels": 2}.get(kind, 0)  # scales, sums
        sizes = [size, size, size, whole] if kind == "levels" else [size, size]
        multiply = getattr(loaded, f"secateur_multiply_{kind}")
        multiply.argtypes = [whole, *[place] * (5 + beside), *sizes, whole, whole]
        for unpack in ("unpack", "widen"):
            if function := getattr(loaded, f"secateur_{unpack}_{kind}", None):
                function.argtypes = [whole, *[place] * 5, *sizes, whole]
                function.restype = None
    sums = loaded.secateur_sums_levels
    sums.argtypes, sums.restype = [*[place] * 5, size, size, size, whole, whole], None
    loaded.secateur_dense_bf16.argtypes = [whole, *[place] * 3, size, size, whole]
    loaded.secateur_dense_i8.argtypes = [whole, *[place] * 4, size, size, whole]
    loaded.secateur_without_lowest.argtypes = [*[place] * 2, size, size, whole]
    loaded.secateur_without_lowest_rows.argtypes = [*[place] * 2, size, size, size, whole]
    loaded.secateur_best_of_groups.argtypes = [*[place] * 2, size, size, whole, whole]
    loaded.secateur_add_products.argtypes = [whole, whole, *[place] * 3, size, size, whole]
    squares = loaded.secateur_add_squares
    squares.argtypes, squares.restype = [whole, whole, *[place] * 2, size, size, whole], None
    count = loaded.secateur_count
    count.argtypes = [
        whole,
        whole,
        place,
        size,
        size,
        ctypes.c_uint64,
        ctypes.c_uint64,
        place,
        whole,
    ]
    count.restype = None
    loaded.secateur_sweep_block.argtypes = [whole, *[place] * 4, size, size, size, whole, whole]
    one, rounding = ctypes.c_float, loaded.secateur_round_columns
    rounding.argtypes = [whole, *[place] * 5, size, size, one, one, one, one, whole]
    scales = loaded.secateur_best_scales
    scales.argtypes = [whole, *[place] * 5, size, size, size, size, one, one, one, one, whole]
    return loaded


@cache
def best() -> int:
    """The place in `ISAS` of the instruction set that this machine uses; -1 without the library."""
    return -1 if (compiled := library()) is None else compiled.secateur_isa()


def isa() -> str | None:
    """The instruction set that this machine uses, one of `ISAS`; None without the library."""
    return None if best() < 0 else ISAS[best()]


def addresses(*tensors: Tensor) -> list[int]:
    """Where tensors lie in memory, as the library takes them."""
    return [tensor.data_ptr() for tensor in tensors]
