"""Sparse matrices that are multiplied while packed: a bit for each weight, and the kept values.

At batch 1 a matrix product reads every weight once and does little with it, so what counts is
bytes: with half of the weights gone, bfloat16 takes 1.125 bytes a weight instead of 2, and int8
values 0.625. The products are in packed.c, which is compiled with the package where there is a
compiler; without it matrices are unpacked, row by row, and multiplied by torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadCheckpoint
from secateur.kernels.library import ISAS, PACKED_KINDS, addresses, best, library

WORD, SLACK, MOST = 64, 64, 8
"""Columns of a word of the bitmap, bytes that follow the last value, rows of x of one product."""
ROWS_AT_ONCE = 1024
"""How many rows are unpacked at a time for a larger batch."""
KINDS = dict(zip((torch.float32, torch.bfloat16, torch.int8), PACKED_KINDS, strict=True))
"""The values that there are products for, as packed.c calls them."""


@dataclass(frozen=True)
class Packed:
    """A matrix `[rows, columns]`: `bitmap` int64 `[rows, words]`, `values` `[kept + slack]`
    float32, bfloat16, float16 or int8, and `starts` int64 `[rows + 1]`, the place of the first
    value of every row. Bit j of word k is column 64 k + j. int8 values have `scales` float32
    `[rows]`: the weight is the value times the scale of its row.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor
    columns: int
    scales: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.bitmap)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        scales = () if self.scales is None else (self.scales,)
        return (self.bitmap, self.values, self.starts, *scales)

    @cached_property
    def places(self) -> list[int]:
        """Where its tensors lie; looked up once, since small products take microseconds."""
        return addresses(*self.tensors)

    @property
    def bytes(self) -> int:
        """What is read for one product."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(
        self, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Some rows as a dense matrix, zeros +0.0; a view of a wider one where a word is not full.

        As they are stored, int8 as float32; `dtype` float32 is given as fast.
        """
        stop = self.rows if stop is None else stop
        given = self.values.dtype
        wide = given == torch.int8 or (given == torch.bfloat16 and dtype == torch.float32)
        out_dtype = torch.float32 if wide else given
        if (compiled := library()) is not None and given in KINDS:
            words = self.bitmap.shape[1]
            out = torch.empty(stop - start, words * WORD, dtype=out_dtype)
            unpack = getattr(compiled, f"secateur_{'widen' if wide else 'unpack'}_{KINDS[given]}")
            places = addresses(self.bitmap[start:], self.values, self.starts[start:])
            scales = None if self.scales is None else self.scales[start:].data_ptr()
            size = (stop - start, words, torch.get_num_threads())
            unpack(best(), *places, scales, out.data_ptr(), *size)
            return out[:, : self.columns].to(dtype)
        packed_bits = self.bitmap[start:stop].contiguous().numpy().view(np.uint8)
        bits = np.unpackbits(packed_bits, axis=1, bitorder="little")
        mask = torch.from_numpy(bits.view(bool))[:, : self.columns]
        weight = torch.zeros(stop - start, self.columns, dtype=out_dtype)
        weight[mask] = self.values[int(self.starts[start]) : int(self.starts[stop])].to(out_dtype)
        return (weight if self.scales is None else weight * self.scales[start:stop, None]).to(dtype)


def pack(weight: Tensor) -> Packed:
    """Pack a matrix `[rows, columns]` on the CPU. Raises BadCheckpoint for another dtype."""
    if weight.dtype not in (*KINDS, torch.float16):
        raise BadCheckpoint(
            f"Matrices of float32, bfloat16 and float16 can be packed; found {weight.dtype}."
        )
    kept = weight != 0
    bits = nn.functional.pad(kept, (0, -weight.shape[1] % WORD)).numpy()  # whole words
    bitmap = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int64))
    starts = row_starts(bitmap)
    values = torch.zeros(int(starts[-1]) + SLACK // weight.element_size(), dtype=weight.dtype)
    values[: int(starts[-1])] = weight[kept]
    return Packed(bitmap, values, starts, weight.shape[1])


def pack_int8(weight: Tensor) -> Packed:
    """Pack a matrix `[rows, columns]` with int8 values and a scale for each row.

    A kept weight under half a step becomes zero, and is not stored.
    """
    whole, scales = quantised(weight)
    return replace(pack(whole), scales=scales)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 `[rows, columns]`, the largest of a row 127, and scales float32 `[rows]`."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    steps = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def row_starts(bitmap: Tensor) -> Tensor:
    """Where the values of every row begin, and their number last: int64 `[rows + 1]`."""
    counts = np.bitwise_count(bitmap.numpy().view(np.uint64)).sum(1, dtype=np.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(counts)]).cumsum(0)


def check(packed: Packed, name: str = "A packed matrix") -> None:
    """Raise BadCheckpoint unless no product of what came from a file reads beyond its tensors."""
    bitmap, values, starts, columns = packed.bitmap, packed.values, packed.starts, packed.columns
    sound = (
        bitmap.dtype == starts.dtype == torch.int64
        and values.dtype in (*KINDS, torch.float16)
        and bitmap.dim() == 2
        and values.dim() == starts.dim() == 1
        and all(t.is_contiguous() and t.device.type == "cpu" for t in packed.tensors)
        and 0 < columns <= bitmap.shape[1] * WORD < columns + WORD
        and len(starts) == len(bitmap) + 1
        and (values.dtype == torch.int8) == (packed.scales is not None)
        and (
            packed.scales is None
            or (packed.scales.dtype, packed.scales.shape) == (torch.float32, bitmap.shape[:1])
        )
    )
    if not sound:
        raise BadCheckpoint(f"{name} has tensors of the wrong type or shape. Pack the model again.")
    beyond = bitmap.shape[1] * WORD > columns and (bitmap[:, -1] >> (columns % WORD)).any()
    if not torch.equal(starts, row_starts(bitmap)) or beyond:
        raise BadCheckpoint(
            f"{name} has a bitmap that does not agree with where its rows start. Pack it again."
        )
    if values.nbytes < int(starts[-1]) * values.element_size() + SLACK:
        raise BadCheckpoint(
            f"{name} has {len(values)} values; {int(starts[-1])} and slack were wanted."
        )


def multiply(packed: Packed, x: Tensor, *, use: str | None = None) -> Tensor:
    """Multiply x `[…, columns]` by the matrix transposed: `[…, rows]` in the dtype of x.

    bfloat16 matrices take the activations rounded to bfloat16 and add in float32; int8 ones take
    them as float32, or as integers of 16 bits. Larger batches than `MOST` are taken by and by.
    Without the library the matrix is unpacked. `use` forces an instruction set of `ISAS` that this
    machine has, for tests.
    """
    product = _product(packed.values.dtype)
    if product is None or not x.numel():
        return multiply_unpacked(packed, x)
    count, words = len(packed.bitmap), packed.bitmap.shape[1]
    dtype = packed.values.dtype if packed.scales is None else torch.float32
    flat = x.reshape(-1, packed.columns).to(dtype)
    if packed.columns < words * WORD:
        flat = nn.functional.pad(flat, (0, words * WORD - packed.columns))
    flat = flat.contiguous()
    y = torch.empty(len(flat), count)
    instructions, threads = best() if use is None else ISAS.index(use), torch.get_num_threads()
    read, written, step = flat.data_ptr(), y.data_ptr(), words * WORD * flat.element_size()
    for start in range(0, len(flat), MOST):
        places = (*packed.places, read + start * step, written + start * count * 4)
        batch = min(MOST, len(flat) - start)
        failed = product(instructions, *places, count, words, batch, threads)
        assert not failed, f"the packed product failed with {failed}"
    return y.to(x.dtype).view(*x.shape[:-1], count)


@cache
def _product(dtype: torch.dtype) -> Callable[..., int] | None:
    """The compiled product for values of a dtype, None where there is none."""
    if (compiled := library()) is None or dtype not in KINDS:
        return None
    return getattr(compiled, f"secateur_multiply_{KINDS[dtype]}")


def multiply_unpacked(packed: Packed, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same with torch, some rows unpacked at a time, in `dtype` (None: as stored)."""
    flat = x.reshape(-1, x.shape[-1])
    parts = []
    for start in range(0, packed.rows, ROWS_AT_ONCE):
        weight = packed.dense(start, min(start + ROWS_AT_ONCE, packed.rows), dtype)
        parts.append(nn.functional.linear(flat.to(weight.dtype), weight))
    return torch.cat(parts, 1).to(x.dtype).view(*x.shape[:-1], packed.rows)


def dense_product(weight: Tensor, x: Tensor, scales: Tensor | None = None) -> Tensor | None:
    """Multiply x `[columns]` by a dense matrix transposed, float32 `[rows]`, in a kernel of ours.

    bfloat16 with bfloat16 x, or int8 with `scales` `[rows]` and float32 x; None where this machine
    or the shape has no such product.
    """
    if (compiled := library()) is None:
        return None
    y, size = torch.empty(len(weight)), (*weight.shape, torch.get_num_threads())
    if scales is not None:
        missing = compiled.secateur_dense_i8(best(), *addresses(weight, scales, x, y), *size)
    elif weight.dtype == x.dtype == torch.bfloat16:
        missing = compiled.secateur_dense_bf16(best(), *addresses(weight, x, y), *size)
    else:
        return None
    return None if missing else y
