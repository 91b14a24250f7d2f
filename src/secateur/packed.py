"""Sparse matrices that stay packed while they are multiplied: a bit for each weight, and the kept values.

At batch 1 a matrix product reads every weight once and does little with it, so what counts is bytes: with half of the
weights gone, bfloat16 takes 1.125 bytes a weight instead of 2. The products are in packed.c, which is compiled with
the package where there is a compiler; without it matrices are unpacked, row by row, and multiplied by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadCheckpoint

WORD, SLACK, MOST = 64, 64, 8
"""Columns of a word of the bitmap, bytes that must follow the last value, rows of x that one product takes."""
ROWS_AT_ONCE = 1024
"""How many rows are unpacked at a time for a larger batch."""
ISAS = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class Packed:
    """A matrix `[rows, columns]`: `bitmap` int64 `[rows, words]`, `values` `[kept + slack]` float32 or bfloat16, and
    `starts` int64 `[rows + 1]`, the place of the first value of every row. Bit j of word k is column 64 k + j.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor
    columns: int

    @property
    def rows(self) -> int:
        return len(self.bitmap)

    @property
    def bytes(self) -> int:
        """What is read for one product."""
        return sum(t.numel() * t.element_size() for t in (self.bitmap, self.values, self.starts))

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows as a dense matrix, zeros +0.0; a view of a wider one where a word is not full."""
        stop = self.rows if stop is None else stop
        if (compiled := library()) is not None:
            words = self.bitmap.shape[1]
            out = torch.empty(stop - start, words * WORD, dtype=self.values.dtype)
            unpack = compiled.secateur_unpack_bf16 if out.dtype == torch.bfloat16 else compiled.secateur_unpack_f32
            unpack(
                _best(), self.bitmap[start:].data_ptr(), self.values.data_ptr(), self.starts[start:].data_ptr(),
                out.data_ptr(), stop - start, words, torch.get_num_threads(),
            )  # fmt: skip
            return out[:, : self.columns]
        mask = _bits(self.bitmap[start:stop])[:, : self.columns]
        weight = torch.zeros(stop - start, self.columns, dtype=self.values.dtype)
        weight[mask] = self.values[int(self.starts[start]) : int(self.starts[stop])]
        return weight


def pack(weight: Tensor) -> Packed:
    """Pack a matrix `[rows, columns]`, float32 or bfloat16, on the CPU. Raises BadCheckpoint for another dtype."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise BadCheckpoint(f"Matrices of float32 and bfloat16 can be packed; found {weight.dtype}.")
    kept = weight != 0
    words = -(-weight.shape[1] // WORD)
    bits = np.zeros((len(weight), words * WORD), dtype=bool)
    bits[:, : weight.shape[1]] = kept.numpy()
    bitmap = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int64))
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64)
    starts[1:] = kept.sum(1).cumsum(0)
    values = torch.zeros(int(starts[-1]) + SLACK // weight.element_size(), dtype=weight.dtype)
    values[: int(starts[-1])] = weight[kept]
    return Packed(bitmap, values, starts, weight.shape[1])


def _bits(bitmap: Tensor) -> Tensor:
    """bool `[rows, 64 * words]`."""
    bits = np.unpackbits(bitmap.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(bits.view(bool))


def check(packed: Packed) -> None:
    """Raise BadCheckpoint unless no product can read beyond the tensors: what comes from a file is checked first."""
    bitmap, values, starts, columns = packed.bitmap, packed.values, packed.starts, packed.columns
    sound = (
        bitmap.dtype == starts.dtype == torch.int64
        and values.dtype in (torch.float32, torch.bfloat16)
        and bitmap.dim() == 2
        and values.dim() == starts.dim() == 1
        and all(t.is_contiguous() and t.device.type == "cpu" for t in (bitmap, values, starts))
        and 0 < columns <= bitmap.shape[1] * WORD < columns + WORD
        and len(starts) == len(bitmap) + 1
    )
    if not sound:
        raise BadCheckpoint("A packed matrix has tensors of the wrong type or shape. Pack the model again.")
    bits = [_bits(part) for part in bitmap.split(ROWS_AT_ONCE)]
    counts, beyond = torch.cat([part.sum(1) for part in bits]), any(part[:, columns:].any() for part in bits)
    if starts[0] != 0 or not torch.equal(starts.diff(), counts) or beyond:
        raise BadCheckpoint("The bitmap of a packed matrix does not agree with where its rows start. Pack it again.")
    if len(values) * values.element_size() < int(starts[-1]) * values.element_size() + SLACK:
        raise BadCheckpoint(f"A packed matrix has {len(values)} values, {int(starts[-1])} and slack were wanted.")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled products, None where the package was installed without a compiler."""
    found = find_spec("secateur._packed")
    if found is None or found.origin is None:
        return None
    loaded = ctypes.CDLL(found.origin)
    for name in ("secateur_multiply_f32", "secateur_multiply_bf16"):
        pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        getattr(loaded, name).argtypes = [ctypes.c_int, *pointers, *sizes]
    sizes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    for name in ("secateur_unpack_f32", "secateur_unpack_bf16"):
        getattr(loaded, name).argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4, *sizes]
        getattr(loaded, name).restype = None
    pointers = [ctypes.c_void_p] * 3
    loaded.secateur_dense_bf16.argtypes = [ctypes.c_int, *pointers, *sizes]
    return loaded


@cache
def _best() -> int:
    return -1 if (found := library()) is None else found.secateur_isa()


def isa() -> str | None:
    """The instruction set that this machine uses, one of `ISAS`; None without the library."""
    return None if _best() < 0 else ISAS[_best()]


def multiply(packed: Packed, x: Tensor, *, use: str | None = None) -> Tensor:
    """x `[…, columns]` times the matrix transposed, `[…, rows]` in the dtype of x.

    bfloat16 matrices take the activations rounded to bfloat16 and add in float32. Larger batches than `MOST` unpack
    the matrix by and by. `use` forces an instruction set of `ISAS` that this machine has, for tests.
    """
    flat = x.reshape(-1, x.shape[-1])
    compiled = library()
    if compiled is None or len(flat) > MOST or not len(flat):
        y = _unpacked(packed, flat)
    else:
        y = torch.empty(len(flat), packed.rows)
        words = packed.bitmap.shape[1]
        rows = flat.to(packed.values.dtype).contiguous()
        if packed.columns < words * WORD:
            rows = nn.functional.pad(rows, (0, words * WORD - packed.columns))
        half = packed.values.dtype == torch.bfloat16
        product = compiled.secateur_multiply_bf16 if half else compiled.secateur_multiply_f32
        failed = product(
            _best() if use is None else ISAS.index(use), packed.bitmap.data_ptr(), packed.values.data_ptr(),
            packed.starts.data_ptr(), rows.data_ptr(), y.data_ptr(), packed.rows, words, len(flat),
            torch.get_num_threads(),
        )  # fmt: skip
        assert not failed, f"the packed product failed with {failed}"
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def dense_product(weight: Tensor, x: Tensor) -> Tensor | None:
    """x `[columns]` times a dense bfloat16 matrix transposed, float32 `[rows]`: our own, to compare packed ones with.

    None where this machine or the shape has none.
    """
    if (compiled := library()) is None or weight.dtype != torch.bfloat16 or x.dtype != torch.bfloat16:
        return None
    y = torch.empty(len(weight))
    pointers = (t.data_ptr() for t in (weight, x, y))
    missing = compiled.secateur_dense_bf16(_best(), *pointers, *weight.shape, torch.get_num_threads())
    return None if missing else y


def _unpacked(packed: Packed, x: Tensor) -> Tensor:
    parts = [
        nn.functional.linear(x.to(packed.values.dtype), packed.dense(start, min(start + ROWS_AT_ONCE, packed.rows)))
        for start in range(0, packed.rows, ROWS_AT_ONCE)
    ]
    return torch.cat(parts, 1).float()


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; for inference on the CPU."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        for name in ("bitmap", "values", "starts"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = packed.columns, packed.rows

    @property
    def packed(self) -> Packed:
        return Packed(self.bitmap, self.values, self.starts, self.in_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(self.packed, x)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return y if bias is None else y + bias


def packable(model: nn.Module, least: float) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers on the CPU, float32 or bfloat16, of which at least a share `least` is zero."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.dtype in (torch.float32, torch.bfloat16):
            zeros = (module.weight == 0).sum().item() / module.weight.numel()
            if zeros >= least and module.weight.device.type == "cpu":
                yield name, module


def pack_model(model: nn.Module, *, least: float = 0.4) -> list[str]:
    """Replace the linear layers that have enough zeros by packed ones, in place; returns their names.

    Under 40 % zeros a bfloat16 matrix is not smaller enough to be faster.
    """
    names = []
    for name, module in list(packable(model, least)):
        owner, _, leaf = name.rpartition(".")
        bias = None if module.bias is None else module.bias.data
        setattr(model.get_submodule(owner), leaf, PackedLinear(pack(module.weight.data), bias))
        names.append(name)
    return names
