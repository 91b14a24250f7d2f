"""Sparse matrices that are multiplied while packed: a bit for each weight, and the kept values.

At batch 1 a matrix product reads every weight once and does little with it, so what counts is
bytes: with half of the weights gone, bfloat16 takes 1.125 bytes a weight instead of 2, int8 values
0.625, values of four bits 0.4 and of three 0.34. The products are in packed.c and packed_levels.c,
which are compiled with the package where there is a compiler; without it matrices are unpacked, row
by row, and multiplied by torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import BadCheckpoint, BadPattern
from secateur.kernels.library import ISAS, PACKED_KINDS, addresses, best, library

WORD, SLACK, MOST = 64, 64, 8
"""Columns of a word of the bitmap, bytes that follow the last value, rows of x of one product."""
EIGHTS = WORD // 8
ROWS_AT_ONCE = 1024
"""How many rows are unpacked at a time for a larger batch."""
LEVELS = torch.uint8
"""The dtype of values of four bits or fewer, side by side."""
KINDS = dict(zip((torch.float32, torch.bfloat16, torch.int8, LEVELS), PACKED_KINDS, strict=True))
"""The values that there are products for, as the library calls them."""


@dataclass(frozen=True)
class Packed:
    """A matrix `[rows, columns]`: `bitmap` int64 `[rows, words]`, `values` `[kept + slack]`
    float32, bfloat16, float16 or int8, and `starts` int64 `[rows + 1]`, the place of the first
    value of every row. Bit j of word k is column 64 k + j. int8 values have `scales` float32
    `[rows]`: the weight is the value times the scale of its row.

    Values of few `bits`, four to two with a sign, are `values` uint8 `[bytes + slack]`, side by
    side from the lowest bit of a byte on; those of every word begin at a byte of their own, and
    `starts` count bytes. Their `scales` are bfloat16 `[rows, groups]`, each for as many consecutive
    words as the others.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor
    columns: int
    scales: Tensor | None = None
    bits: int | None = None

    @property
    def rows(self) -> int:
        return len(self.bitmap)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        scales = () if self.scales is None else (self.scales,)
        return (self.bitmap, self.values, self.starts, *scales)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its rows, its words and, with values of few bits, its groups and those bits, as the
        library asks.
        """
        if self.bits is None or self.scales is None:
            return tuple(self.bitmap.shape)
        return (*self.bitmap.shape, self.scales.shape[1], self.bits)

    @cached_property
    def sums(self) -> Tensor:
        """The weights of each row of values of few bits added up, float32 `[rows]`."""
        compiled, sums = library(), torch.empty(self.rows)
        assert compiled is not None
        compiled.secateur_sums_levels(*addresses(*self.tensors, sums), *self.sizes, 1)
        return sums

    @cached_property
    def places(self) -> list[int]:
        """Where its tensors lie; looked up once, since small products take microseconds."""
        return addresses(*self.tensors, *([] if self.bits is None else [self.sums]))

    @cached_property
    def kept(self) -> int:
        """How many weights are kept."""
        return int(np.bitwise_count(self.bitmap.numpy().view(np.uint64)).sum(dtype=np.int64))

    @property
    def bytes(self) -> int:
        """What is read for one product."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(
        self, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Some rows as a dense matrix, zeros +0.0; a view of a wider one where a word is not full.

        As they are stored, int8 and few bits as float32; `dtype` float32 is given as fast.
        """
        stop = self.rows if stop is None else stop
        given = self.values.dtype
        wide = self.scales is not None or (given == torch.bfloat16 and dtype == torch.float32)
        out_dtype = torch.float32 if wide else given
        if (compiled := library()) is not None and given in KINDS:
            _, words, *others = self.sizes
            out = torch.empty(stop - start, words * WORD, dtype=out_dtype)
            unpack = getattr(compiled, f"secateur_{'widen' if wide else 'unpack'}_{KINDS[given]}")
            places = addresses(self.bitmap[start:], self.values, self.starts[start:])
            scales = None if self.scales is None else self.scales[start:].data_ptr()
            size = (stop - start, words, *others, torch.get_num_threads())
            unpack(best(), *places, scales, out.data_ptr(), *size)
            return out[:, : self.columns].to(dtype)
        weight = torch.zeros(stop - start, self.columns, dtype=out_dtype)
        weight[self._kept(start, stop)] = self._values(start, stop).to(out_dtype)
        if self.scales is None:
            return weight.to(dtype)
        scales = self.scales[start:stop].float().view(stop - start, -1)  # [rows, groups]
        each = -(-self.columns // scales.shape[1])
        return (weight * scales.repeat_interleave(each, 1)[:, : self.columns]).to(dtype)

    def _kept(self, start: int, stop: int) -> Tensor:
        """Which weights of some rows are kept, bool."""
        packed_bits = self.bitmap[start:stop].contiguous().numpy().view(np.uint8)
        bits = np.unpackbits(packed_bits, axis=1, bitorder="little")
        return torch.from_numpy(bits.view(bool))[:, : self.columns]

    def _values(self, start: int, stop: int) -> Tensor:
        """The values of some rows, one after the other."""
        stored = self.values[int(self.starts[start]) : int(self.starts[stop])]
        if self.bits is None:
            return stored
        bits, counts = self.bits, _counts(self.bitmap[start:stop]).reshape(-1, 1)
        words = np.zeros((len(counts), EIGHTS, 4), np.uint8)
        held = np.zeros((len(counts), EIGHTS * bits), np.uint8)
        held[_first(held, _bytes(counts, bits))] = stored.numpy()
        words[:, :, :bits] = held.reshape(-1, EIGHTS, bits)
        values = words.view("<u4") >> bits * np.arange(8, dtype=np.uint32)
        values = values.reshape(-1, WORD)
        levels = values[_first(values, counts)].astype(np.uint8) << 8 - bits
        return torch.from_numpy(levels).view(torch.int8) >> 8 - bits


def pack(weight: Tensor) -> Packed:
    """Pack a matrix `[rows, columns]` on the CPU. Raises BadCheckpoint for another dtype."""
    if weight.dtype not in (*KINDS, torch.float16) or weight.dtype == LEVELS:
        raise BadCheckpoint(
            f"Matrices of float32, bfloat16 and float16 can be packed; found {weight.dtype}."
        )
    kept = weight != 0
    bitmap = _bitmap(kept)
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


def pack_levels(levels: Tensor, scales: Tensor, bits: int) -> Packed:
    """Pack a matrix in levels `[rows, columns]`, integers of 2 to 4 `bits` with a sign, and scales
    `[rows, groups]`, which bfloat16 holds. A level of 0 is not stored.

    Raises BadPattern for groups that are no whole words.
    """
    columns, groups = levels.shape[1], scales.shape[1]
    if groups > 1 and columns % (groups * WORD):
        raise BadPattern(
            f"Packed integers have a scale for each group of a multiple of {WORD} inputs, or for a "
            f"row; found groups of {columns // groups}. Say 'int{bits} of group {WORD}' or "
            f"'int{bits} of row'."
        )
    kept = levels != 0
    bitmap = _bitmap(kept)
    starts = row_starts(bitmap, bits)
    counts = _counts(bitmap).reshape(-1, 1)
    words = np.zeros((len(counts), WORD), np.uint32)
    words[_first(words, counts)] = levels[kept].to(torch.int8).numpy().view(np.uint8) % 2**bits
    words <<= np.tile(bits * np.arange(8, dtype=np.uint32), EIGHTS)
    eights = words.reshape(-1, EIGHTS, 8).sum(2, dtype="<u4", keepdims=True).view(np.uint8)
    held = eights[:, :, :bits].reshape(-1, EIGHTS * bits)  # eight values in as many bytes as bits
    values = torch.zeros(int(starts[-1]) + SLACK, dtype=LEVELS)
    values[:-SLACK] = torch.from_numpy(held[_first(held, _bytes(counts, bits))])
    return Packed(bitmap, values, starts, columns, scales.to(torch.bfloat16).contiguous(), bits)


def _bitmap(kept: Tensor) -> Tensor:
    """Whole words `[rows, words]` of a mask `[rows, columns]`."""
    bits = nn.functional.pad(kept, (0, -kept.shape[1] % WORD)).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int64))


def _counts(bitmap: Tensor) -> np.ndarray:
    """How many weights each word keeps, uint8, of the shape of `bitmap`."""
    return np.bitwise_count(bitmap.contiguous().numpy().view(np.uint64))


def _bytes(counts: np.ndarray, bits: int) -> np.ndarray:
    """The bytes that so many values of few bits take, those of a word from a whole byte on."""
    return (counts.astype(np.int64) * bits + 7) // 8


def _first(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which columns of a table are the first ones: so many as `counts` `[rows, 1]` says."""
    return np.arange(table.shape[1]) < counts


def joined(parts: Sequence[Packed]) -> Packed:
    """The matrix whose rows are those of `parts`, one after the other."""
    first = parts[0]
    values = [part.values[: int(part.starts[-1])] for part in parts]
    slack = torch.zeros(SLACK // first.values.element_size(), dtype=first.values.dtype)
    before = torch.tensor([0, *(int(part.starts[-1]) for part in parts[:-1])]).cumsum(0)
    starts = [part.starts[:-1] + start for part, start in zip(parts, before, strict=True)]
    end = torch.tensor([sum(map(len, values))])
    scales = [part.scales for part in parts if part.scales is not None]
    return Packed(
        torch.cat([part.bitmap for part in parts]),
        torch.cat([*values, slack]),
        torch.cat([*starts, end]),
        first.columns,
        torch.cat(scales) if scales else None,
        first.bits,
    )


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 `[rows, columns]`, the largest of a row 127, and scales float32 `[rows]`."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    steps = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def row_starts(bitmap: Tensor, bits: int | None = None) -> Tensor:
    """Where the values of every row begin, and their number last: int64 `[rows + 1]`; of values of
    few `bits`, which byte.
    """
    counts = _counts(bitmap)
    if bits is not None:
        counts = _bytes(counts, bits)
    sums = torch.from_numpy(counts.sum(1, dtype=np.int64))
    return torch.cat([torch.zeros(1, dtype=torch.int64), sums]).cumsum(0)


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
        and _scales_fit(packed)
    )
    if not sound:
        raise BadCheckpoint(f"{name} has tensors of the wrong type or shape. Pack the model again.")
    beyond = bitmap.shape[1] * WORD > columns and (bitmap[:, -1] >> (columns % WORD)).any()
    if not torch.equal(starts, row_starts(bitmap, packed.bits)) or beyond:
        raise BadCheckpoint(
            f"{name} has a bitmap that does not agree with where its rows start. Pack it again."
        )
    if values.nbytes < int(starts[-1]) * values.element_size() + SLACK:
        raise BadCheckpoint(
            f"{name} has {len(values)} values; {int(starts[-1])} and slack were wanted."
        )


def _scales_fit(packed: Packed) -> bool:
    """Whether the scales are those of such values, as many as there are rows and groups."""
    values, scales, (rows, words) = packed.values, packed.scales, packed.bitmap.shape
    if (values.dtype == LEVELS) != (packed.bits in (4, 3, 2)):
        return False
    if scales is None:
        return values.dtype not in (torch.int8, LEVELS)
    if values.dtype == LEVELS:
        shaped = scales.dim() == 2 and scales.shape[1] > 0 and words % scales.shape[1] == 0
        return shaped and scales.dtype == torch.bfloat16 and len(scales) == rows
    return (values.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (rows,))


def multiply(packed: Packed, x: Tensor, *, use: str | None = None) -> Tensor:
    """Multiply x `[…, columns]` by the matrix transposed: `[…, rows]` in the dtype of x.

    bfloat16 matrices take the activations rounded to bfloat16 and add in float32; int8 and fewer
    bits take them as float32, or as integers of 16 bits. Larger batches than `MOST` are taken by
    and by. Without the library the matrix is unpacked. `use` forces an instruction set of `ISAS`
    that this machine has, for tests.
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
        failed = product(instructions, *places, *packed.sizes, batch, threads)
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
