"""HQQ: groups of 1 to 8 bits with a scale and a zero that need not be whole numbers.

`W_q` holds the numbers of all groups as a matrix `[groups, size]` (axis 1) or `[size, groups]`
(axis 0), whose rows are packed: the first in the highest bits of the first row, and the one that
many rows on in the bits below. What else there is to say lies beside it in tensors, text as its
bytes: `shape`, `packing`, `compute_dtype`, `axis`. A weight is `(number - zero) * scale` in that
dtype, as `Quantizer.dequantize` has it. The library writes it so itself (`save_to_safetensors`),
and so did transformers 4; version 5 cannot.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.packed import Decoded, Packed, QuantisedFolder

NUMBERS = "W_q"
PARTS = (
    NUMBERS,
    "scale",
    "zero",
    "shape",
    "packing",
    "axis",
    "nbits",
    "group_size",
    "compute_dtype",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "channel_wise",
    "optimize",
    "round_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
)
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
MOST_TEXT = 40
"""Bytes of a text; the longest that the library writes has 14."""


class Packing(NamedTuple):
    """How numbers lie in a word: how many bits each has, and how many there are."""

    bits: int
    numbers: int
    word: torch.dtype


WORDS = {torch.uint8: "U8", torch.int32: "I32"}
PACKINGS = {
    "8bit_u8": Packing(8, 1, torch.uint8),
    "4bit_u8": Packing(4, 2, torch.uint8),
    "3bit_32": Packing(3, 10, torch.int32),
    "2bit_u8": Packing(2, 4, torch.uint8),
    "1bit_u8": Packing(1, 8, torch.uint8),
}


class Layout(NamedTuple):
    """A packed weight: how its words are read, the dtype of its numbers, and its own shape."""

    packing: Packing
    dtype: torch.dtype
    shape: tuple[int, ...]


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, parts of that name are there."""
    method = source.settings.get("quant_method")
    return method == "hqq" or (method is None and any(source.packed(f".{NUMBERS}")))


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every packed weight."""
    tensors: Decoded = {}
    kinds = set[str]()
    for packed in source.packed(NUMBERS):
        words, own = _matrix(packed)
        kinds.add(words)
        tensors |= own
    return " and ".join(sorted(kinds)), tensors


def _matrix(packed: Packed) -> tuple[str, Decoded]:
    """How a weight is stored, and the plain one. Raises BadCheckpoint where its parts do not fit
    each other.
    """
    layout = _layout(packed)
    count = prod(layout.shape)
    words = packed.place(NUMBERS)
    per_word = layout.packing.word.itemsize
    if len(words.shape) != 2 or words.bytes % per_word:
        raise packed.bad(f"has W_q of shape {list(words.shape)}; a matrix was wanted")
    rows = words.shape[0] * layout.packing.numbers
    width = words.bytes // per_word // max(words.shape[0], 1)
    spare = layout.packing.numbers if layout.packing.bits == 3 else 1
    if not width or count % width or not 0 <= rows - count // width < spare:
        raise packed.bad(
            f"has {rows} rows of {width} numbers of {layout.packing.bits} bits for shape "
            f"{list(layout.shape)}"
        )
    packed.place("scale", list(FLOATS))
    scales = packed.place("scale").shape
    if prod(scales) != 1 and scales not in ((count // width, 1), (1, width)):
        raise packed.bad(f"has a scale of shape {list(scales)} for {count // width} × {width}")
    packed.require("zero", scales, list(FLOATS))
    sizes: dict[tuple[int, ...], str] = {
        (count // width, 1): f", groups of {width}",
        (1, width): f", groups of {count // width}",
    }
    text = f"HQQ {layout.packing.bits}-bit{sizes.get(scales, '')}"
    decode = partial(_rows, packed, layout, width)
    return text, packed.dense("weight", layout.shape, decode, text, PARTS)


def _layout(packed: Packed) -> Layout:
    """What the small tensors beside the numbers say. Raises BadCheckpoint where it is odd."""
    packed.require("shape", (2,), ["I64"])
    shape = tuple(packed.tensor("shape").tolist())
    packing, dtype = _text(packed, "packing"), _text(packed, "compute_dtype")
    if packing not in PACKINGS or dtype not in DTYPES or min(shape) < 1:
        raise packed.bad(f"is said to be {list(shape)}, packed as {packing!r}, in {dtype!r}")
    packed.place(NUMBERS, [WORDS[PACKINGS[packing].word], *FLOATS])  # floats are the same bytes
    return Layout(PACKINGS[packing], DTYPES[dtype], shape)


def _text(packed: Packed, part: str) -> str:
    """A text that is stored as its bytes."""
    place = packed.place(part, ["U8"])
    if len(place.shape) != 1 or place.bytes > MOST_TEXT:
        raise packed.bad(f"has {part} of shape {list(place.shape)}; a text was wanted")
    return bytes(packed.tensor(part).tolist()).decode("latin-1")


def _rows(packed: Packed, layout: Layout, width: int, start: int, stop: int) -> Tensor:
    """Rows of a weight, in the dtype that it names."""
    inside = prod(layout.shape[1:])
    first, last = start * inside // width, -(-stop * inside // width)
    words = packed.tensor(NUMBERS).view(layout.packing.word)
    row = torch.arange(first, last)
    bits, count, _ = layout.packing
    shifts = bits * (count - 1 - row // words.shape[0])
    numbers = words[row % words.shape[0]] >> shifts.to(words.dtype).unsqueeze(-1)
    values = (numbers & 2**bits - 1).to(layout.dtype)
    zeros, scales = (packed.tensor(part).to(layout.dtype) for part in ("zero", "scale"))
    if scales.ndim == 2 and scales.shape[0] > 1:
        zeros, scales = zeros[first:last], scales[first:last]
    values = ((values - zeros) * scales).flatten()
    skipped = start * inside - first * width
    return values[skipped : skipped + (stop - start) * inside].view(stop - start, inside)
