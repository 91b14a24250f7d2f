"""What all formats share: a packed tensor with the tensors beside it, and numbers of few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, Checkpoint, TensorLocation
from secateur.checkpoints.quantised.base import DenseTensor
from secateur.errors import BadCheckpoint

PIECE = 2**20
"""How many weights are decoded at a time: few enough for the caches of a processor."""
ROWS = 256
"""Pieces of a matrix begin at a multiple of so many rows, which every format packs whole."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
WORDS = ("I32", "U32")
Decoded = dict[str, DenseTensor | tuple[DenseTensor, ...] | None]
"""By the name of a stored tensor: the plain one that it becomes, or several, None where it belongs
to others. What is not named is plain already.
"""


@dataclass(frozen=True)
class QuantisedFolder:
    """A checkpoint folder that is quantised: its tensors, its config.json and, of that or of a file
    beside it, the part that says how (`settings`).
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    def packed(self, last: str) -> Iterator[Packed]:
        """The packed tensors whose main part is called `last`."""
        for name in self.checkpoint.places:
            if name.endswith(last):
                yield Packed(self.checkpoint, name.removesuffix(last))


@dataclass(frozen=True)
class Packed:
    """A tensor in several parts, each named by the same `prefix` and its own name."""

    checkpoint: Checkpoint
    prefix: str

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return self.prefix + part in self.checkpoint.places

    def place(self, part: str, dtypes: Sequence[str] = ()) -> TensorLocation:
        """Where a part lies. Raises BadCheckpoint where it is missing, or of another dtype."""
        place = self.checkpoint.places.get(self.prefix + part)
        if place is None:
            raise self.bad(f"has no {part}")
        if dtypes and place.dtype not in dtypes:
            raise self.bad(f"has {part} in {place.dtype}; {' or '.join(dtypes)} was wanted")
        return place

    def tensor(self, part: str) -> Tensor:
        """A part, mapped from its shard."""
        return self.checkpoint.tensor(self.prefix + part)

    def require(self, part: str, shape: tuple[int, ...], dtypes: Sequence[str] = ()) -> None:
        """Raise BadCheckpoint unless a part is there, and has that shape and one of the dtypes."""
        if (given := self.place(part, dtypes).shape) != shape:
            raise self.bad(f"has {part} of shape {list(given)}; {list(shape)} was wanted")

    def bad(self, what: str) -> BadCheckpoint:
        """What to raise where the parts do not fit each other."""
        return BadCheckpoint(
            f"{self.prefix.rstrip('._')} in {self.checkpoint.folder} {what}. Fetch the checkpoint "
            "again."
        )

    def decoded(self, dense: DenseTensor, parts: Sequence[str]) -> Decoded:
        """The plain tensor in the place of the first of the parts, which all belong to it. Raises
        BadCheckpoint where it is there as well.
        """
        names = [self.prefix + part for part in parts if self.has(part)]
        if dense.name in self.checkpoint.places and dense.name not in names:
            raise self.bad("is there twice, packed and plain")
        return {names[0]: dense, **dict.fromkeys(names[1:])}

    def dense(
        self,
        last: str,
        shape: tuple[int, ...],
        decode: Callable[[int, int], Tensor],
        stored: str,
        parts: Sequence[str],
    ) -> Decoded:
        """The plain tensor `prefix + last`; `decode(start, stop)` gives rows of it, or experts."""
        rows, inside = next(iter(shape), 1), max(prod(shape[1:]), 1)
        step = max(PIECE // inside, 1)
        step = step if len(shape) > 2 else max(step // ROWS, 1) * ROWS
        size = sum(self.place(part).bytes for part in parts if self.has(part))
        tensor = DenseTensor(
            self.prefix + last,
            shape,
            partial(decode, 0, rows),
            stored,
            size,
            partial(pieces, decode, rows, step),
        )
        return self.decoded(tensor, parts)


def pieces(decode: Callable[[int, int], Tensor], rows: int, step: int) -> Iterator[Tensor]:
    """All rows, `step` at a time."""
    for start in range(0, rows, step):
        yield decode(start, min(start + step, rows))


def plain(checkpoint: Checkpoint, name: str) -> DenseTensor:
    """A tensor that is stored as it is."""
    place = checkpoint.places[name]
    read = partial(checkpoint.tensor, name)
    return DenseTensor(name, place.shape, read, place.dtype, place.bytes)


def all_tensors(source: QuantisedFolder, decoded: Decoded) -> tuple[DenseTensor, ...]:
    """The tensors of the plain checkpoint, in the order of the stored ones.

    Raises BadCheckpoint where one is left whose dtype no plain weight has: what was expected beside
    it is missing.
    """
    tensors: list[DenseTensor] = []
    for name, place in source.checkpoint.places.items():
        tensor = decoded[name] if name in decoded else plain(source.checkpoint, name)
        if tensor is None:
            continue
        if name not in decoded and place.dtype not in FLOATS and len(place.shape) > 1:
            raise BadCheckpoint(
                f"{name} in {source.checkpoint.folder} is stored as {place.dtype}, and no scales "
                "for it are there. Fetch the checkpoint again."
            )
        tensors += tensor if isinstance(tensor, tuple) else (tensor,)
    return tuple(tensors)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits in the last dimension of integers, lowest first.

    `words` [..., w] are whole numbers of any width, read as one stream of bits from their lowest
    on; gives uint8 [..., count].
    """
    stream = words.contiguous().view(torch.uint8)  # [..., bytes]
    mask = 2**bits - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        table = (torch.arange(256, dtype=torch.uint8).unsqueeze(-1) >> shifts) & mask
        return looked_up(stream, table)[..., :count]
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bits))
    eight = stream.unflatten(-1, (-1, bits)).long()  # so many bytes hold eight numbers
    eight = (eight << torch.arange(0, 8 * bits, 8)).sum(-1)
    numbers = (eight.unsqueeze(-1) >> torch.arange(0, 8 * bits, bits)) & mask
    return numbers.flatten(-2)[..., :count].to(torch.uint8)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of four bits with two for the exponent and one for the mantissa."""


def looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """The rows of a table [256, k] for bytes [..., n], one after the other: [..., k n].

    A row is taken as one whole number of 8 to 64 bits; indexing takes five times as long.
    """
    whole = getattr(torch, f"int{8 * table[0].nbytes}")
    rows = table.contiguous().view(whole).flatten()
    taken = rows.index_select(0, codes.flatten().int()).view(table.dtype)
    return taken.view(*codes.shape[:-1], codes.shape[-1] * table.shape[1])


def four_bit(
    stored: Tensor, table: Sequence[float] | Tensor, *, high_first: bool = False
) -> Tensor:
    """Bytes [..., n] as numbers [..., 2 n] of a table with sixteen, the low half first or last."""
    codes = torch.arange(256)
    halves = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    return looked_up(stored, torch.as_tensor(table)[torch.stack(halves, -1)])


def eight_bit(stored: Tensor) -> Tensor:
    """Eight-bit floats as float32."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(stored.dtype).float().unsqueeze(-1)
    return looked_up(stored.view(torch.uint8), table)


def power_of_two(exponents: Tensor) -> Tensor:
    """The scales float32 for exponents in a byte (E8M0), 127 for one."""
    return exponents.view(torch.float8_e8m0fnu).float()


Steps = tuple[int, ...]
"""How many weights share a scale in each dimension; 0 where the scales do not fit."""


def scale_steps(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None = None
) -> Steps:
    """How scales of one shape lie over weights of another: `block` as it is named, where the last
    may be cut short, else equal parts.
    """
    if all(size == 1 for size in scales):
        return shape
    scales = (*scales, *[1] * (len(shape) - len(scales)))
    if len(scales) != len(shape):
        return (0,) * len(shape)
    named = (*[1] * (len(shape) - 2), *(block or (0, 0)))
    return tuple(map(_step, shape, scales, named))


def _step(size: int, scales: int, named: int) -> int:
    if named and -(-size // named) == scales:
        return named
    return size // scales if scales and size % scales == 0 else 0


def spread(scales: Tensor, shape: tuple[int, ...], steps: Steps, start: int, stop: int) -> Tensor:
    """The scale of each weight in the rows from `start` to `stop`, or one in a dimension that
    shares it.
    """
    return _in_each(_in_rows(scales, shape, steps, start, stop), shape, steps, len(shape) - 1)


def scaled(
    values: Tensor, scales: Tensor, shape: tuple[int, ...], steps: Steps, start: int
) -> Tensor:
    """The rows of weights that begin at `start`, multiplied by their scales in place."""
    scales, step = _in_rows(scales, shape, steps, start, start + len(values)), steps[-1]
    if scales.ndim and 1 < scales.shape[-1] < shape[-1] == scales.shape[-1] * step:
        values.unflatten(-1, (-1, step)).mul_(scales.unsqueeze(-1))
        return values
    return values.mul_(_in_each(scales, shape, steps, len(shape) - 1))


def _in_rows(scales: Tensor, shape: tuple[int, ...], steps: Steps, start: int, stop: int) -> Tensor:
    """Scales for the rows from `start` to `stop`, spread over all dimensions but the last."""
    if scales.numel() == 1:
        return scales.reshape(())
    scales = scales.reshape(*scales.shape, *[1] * (len(shape) - scales.ndim))
    if scales.shape[0] > 1:
        scales = scales[torch.arange(start, stop) // steps[0]]
    for dimension in range(1, len(shape) - 1):
        scales = _in_each(scales, shape, steps, dimension)
    return scales


def _in_each(scales: Tensor, shape: tuple[int, ...], steps: Steps, dimension: int) -> Tensor:
    """Scales, one for each place of a dimension where several share one."""
    if not scales.ndim or not 1 < scales.shape[dimension] < shape[dimension]:
        return scales
    return scales.index_select(dimension, torch.arange(shape[dimension]) // steps[dimension])
