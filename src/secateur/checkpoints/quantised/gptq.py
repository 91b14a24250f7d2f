"""GPTQ: whole numbers of 2, 3, 4 or 8 bits, packed along the inputs, in groups or in any order.

`qweight` int32 [in bits/32, out], `qzeros` int32 [groups, out bits/32], `scales` [groups, out], and
`g_idx` int32 [in], the group of each input, where these were sorted (act-order). A weight is
`scale * (number - zero)` in the dtype of the scales. In the first format of checkpoints, "gptq",
zeros are stored less one, and the one is added to the packed words as GPTQModel adds it; in
"gptq_v2" they are stored as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.packed import WORDS, Decoded, Packed, QuantisedFolder, unpacked
from secateur.errors import UnsupportedModel

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word of ones."""
VERSIONS = {
    "gptq": 1,
    "gptq_v2": 2,
    "auto_round:auto_gptq": 1,
    "auto_round": 2,
    "auto_round:gptqmodel": 2,
}
"""By the name of a packing: 1 where zeros are stored less one. The last three are AutoRound's."""


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, weights are packed along the inputs."""
    method = source.settings.get("quant_method")
    if method == "auto-round":
        return "awq" not in str(source.settings.get("packing_format"))
    return method == "gptq" or (method is None and _packed_along_inputs(source))


def _packed_along_inputs(source: QuantisedFolder) -> bool:
    packed = next(iter(source.packed(".qweight")), None)
    if packed is None:
        return False
    parts = Packed(packed.checkpoint, f"{packed.prefix}.")
    return not parts.has("scales") or (
        parts.place("qweight").shape[-1:] == parts.place("scales").shape[-1:]
    )


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every packed matrix. Raises UnsupportedModel for other packings."""
    settings = source.settings
    marlin = "marlin" if settings.get("is_marlin_format") else None
    keys = ("packing_format", "checkpoint_format", "format")
    packing = str(marlin or next(filter(None, map(settings.get, keys)), "gptq"))
    version = VERSIONS.get(packing)
    if version is None:
        raise UnsupportedModel(
            f"{source.checkpoint.folder} holds GPTQ weights packed as {packing}; one of "
            f"{', '.join(VERSIONS)} was wanted. Save them again as gptq, or name the unquantised "
            "model."
        )
    tensors: dict[str, Any] = {}
    kinds, sorted_inputs = set[tuple[int, int]](), False
    for packed in source.packed("qweight"):
        bits, group = _sizes(packed)
        tensors |= _matrix(packed, bits, version)
        kinds.add((bits, group))
        sorted_inputs |= bool(settings.get("desc_act"))
    words = "GPTQ " + " and ".join(
        f"{bits}-bit, groups of {group}" for bits, group in sorted(kinds)
    )
    return words + (", act-order" if sorted_inputs else ""), tensors


def _sizes(packed: Packed) -> tuple[int, int]:
    """Bits of a weight, and how many inputs share a scale, from the shapes."""
    for part in ("qweight", "qzeros"):
        if len(packed.place(part, WORDS).shape) != 2:
            raise packed.bad(f"has {part} of shape {list(packed.place(part).shape)}")
    (rows, out), (groups, columns) = packed.place("qweight").shape, packed.place("qzeros").shape
    bits = 32 * columns // max(out, 1)
    if bits not in BITS or -(-out * bits // 32) != columns:
        raise packed.bad(f"has {columns} columns of qzeros for {out} outputs; no bits fit that")
    inputs = rows * 32 // bits
    if packed.has("g_idx"):
        inputs = next(iter(packed.place("g_idx", WORDS).shape), 0)
        packed.require("g_idx", (inputs,))
    if -(-inputs * bits // 32) != rows:
        raise packed.bad(f"has {rows} rows of qweight for {inputs} inputs of {bits} bits")
    packed.require("scales", (groups, out), list(FLOATS))
    if not groups or (not packed.has("g_idx") and inputs % groups):
        raise packed.bad(f"has {groups} groups for {inputs} inputs")
    return bits, -(-inputs // groups)


def _matrix(packed: Packed, bits: int, version: int) -> Decoded:
    rows, out = packed.place("qweight").shape
    inputs = packed.place("g_idx").shape[0] if packed.has("g_idx") else rows * 32 // bits
    decode = partial(_rows, packed, bits, inputs, version)
    return packed.dense("weight", (out, inputs), decode, f"GPTQ {bits}-bit", PARTS)


def _rows(packed: Packed, bits: int, inputs: int, version: int, start: int, stop: int) -> Tensor:
    """Rows [count, in] in the dtype of the scales."""
    numbers = unpacked(packed.tensor("qweight")[:, start:stop].T, bits, inputs)
    scales = packed.tensor("scales")[:, start:stop].T  # [out, groups]
    columns = slice(start * bits // 32, -(-stop * bits // 32))
    zeros = _zeros(packed.tensor("qzeros")[:, columns], bits, version)[:, : stop - start].T
    groups = _group_of_input(packed, inputs, scales.shape[1])
    difference = numbers.short() - zeros.short()[:, groups]
    return scales[:, groups] * difference


def _group_of_input(packed: Packed, inputs: int, groups: int) -> Tensor:
    """The group of each input. Raises BadCheckpoint where `g_idx` names others."""
    if not packed.has("g_idx"):
        return torch.arange(inputs) // (inputs // groups)
    index = packed.tensor("g_idx").view(torch.int32).long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise packed.bad(
            f"has g_idx from {int(index.min())} to {int(index.max())}; {groups} groups"
        )
    return index


def _zeros(words: Tensor, bits: int, version: int) -> Tensor:
    """The zeros [groups, out] that are packed in words [groups, out bits/32]."""
    if version == 1 and bits in _ONES:
        words = ((words.view(torch.int32).long() + _ONES[bits]) & 0xFFFFFFFF).to(torch.uint32)
    count = words.shape[-1] * 32 // bits
    zeros = unpacked(words, bits, count)
    return (zeros + 1) & 2**bits - 1 if version == 1 and bits not in _ONES else zeros
