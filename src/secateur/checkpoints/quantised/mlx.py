"""MLX: groups of a row in 2 to 8 bits, each with a scale and a bias, packed in words of 32 bits.

`weight` uint32 [out, in bits/32], `scales` and `biases` [out, groups]: a weight is `number * scale
+ bias`, as `mlx.core.dequantize` has it. In the modes mxfp4, mxfp8 and nvfp4 numbers are floats,
and scales, without biases, are bytes. The settings give bits and group size, and others for single
modules by their names. The experts of a block lie in one array for each matrix (`switch_mlp`), and
are taken apart as transformers stores them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.base import DenseTensor
from secateur.checkpoints.quantised.packed import (
    E2M1,
    Decoded,
    Packed,
    QuantisedFolder,
    eight_bit,
    four_bit,
    power_of_two,
    unpacked,
)

EXPERTS = re.compile(r"(.*)\.switch_mlp\.(gate|up|down)_proj\.weight")
OTHER_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
"""What the matrices of experts are called within `block_sparse_moe`."""
PARTS = ("weight", "scales", "biases")
BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Bits and group size of the modes in which numbers are floats."""


def recognised(source: QuantisedFolder) -> bool:
    """Whether words of 32 bits have scales beside them, and no other library's name is given."""
    places = source.checkpoint.places
    words = any(
        places.get(f"{packed.prefix}.weight") is not None
        and places[f"{packed.prefix}.weight"].dtype == "U32"
        for packed in source.packed(".scales")
    )
    return words and source.settings.get("quant_method") is None


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every packed tensor."""
    tensors: dict[str, Any] = {}
    kinds = set[str]()
    for packed in source.packed(".scales"):
        module = Packed(packed.checkpoint, f"{packed.prefix}.")
        stored, own = _tensor(module, _settings_of(packed.prefix, source.settings))
        kinds.add(stored)
        tensors |= own
    return " and ".join(sorted(kinds)), tensors


def _settings_of(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    own = settings.get(module)
    return own if isinstance(own, dict) else settings


def _apart(
    tensor: DenseTensor | None, decode: Callable[[int, int], Tensor]
) -> DenseTensor | tuple[DenseTensor, ...] | None:
    """The matrices of single experts where a tensor [experts, out, in] holds those of a block."""
    match = EXPERTS.fullmatch(tensor.name) if tensor else None
    if tensor is None or match is None:
        return tensor
    block, matrix = match.groups()
    other = block.endswith("block_sparse_moe")
    last = OTHER_NAMES[matrix] if other else f"{matrix}_proj"
    experts, *shape = tensor.shape
    return tuple(
        replace(
            tensor,
            name=f"{block}.experts.{expert}.{last}.weight",
            shape=tuple(shape),
            read=partial(_expert, decode, expert),
            stored_bytes=tensor.stored_bytes // experts,
            pieces=None,
        )
        for expert in range(experts)
    )


def _expert(decode: Callable[[int, int], Tensor], expert: int) -> Tensor:
    return decode(expert, expert + 1).squeeze(0)


def _tensor(packed: Packed, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """How a packed tensor is stored, and what it becomes. Raises BadCheckpoint where its parts do
    not fit each other.
    """
    mode = str(settings.get("mode", "affine"))
    bits, group = FLOAT_MODES.get(mode, (settings.get("bits", 4), settings.get("group_size", 64)))
    if mode not in ("affine", *FLOAT_MODES) or bits not in BITS or not isinstance(group, int):
        raise packed.bad(f"is said to be {mode} of {bits} bits in groups of {group}")
    *rows, words = packed.place("weight", ["U32"]).shape or (0,)
    *_, groups = packed.place("scales").shape or (0,)
    if not rows:
        raise packed.bad(f"has weight of shape {[words]}; a matrix was wanted")
    shape = (*rows, group * groups)
    packed.require("scales", (*rows, groups), list(FLOATS) if mode == "affine" else ["U8"])
    if mode == "affine":
        packed.require("biases", (*rows, groups), [packed.place("scales").dtype])
    if words * 32 != bits * group * groups:
        raise packed.bad(
            f"has {words} words and {groups} groups a row, which {bits} bits in groups of {group} "
            "do not give"
        )
    stored = f"MLX {bits}-bit, groups of {group}" if mode == "affine" else f"MLX {mode}"
    decode = partial(_rows, packed, mode, bits, shape)
    dense: Any = packed.dense("weight", shape, decode, stored, PARTS)
    return stored, {name: _apart(tensor, decode) for name, tensor in dense.items()}


def _rows(
    packed: Packed, mode: str, bits: int, shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Rows of a tensor, or experts, in the dtype of the scales; bfloat16 for floats."""
    words, scales = packed.tensor("weight")[start:stop], packed.tensor("scales")[start:stop]
    if mode == "affine":
        biases = packed.tensor("biases")[start:stop].unsqueeze(-1)
        numbers = unpacked(words, bits, shape[-1]).to(scales.dtype)
        groups = numbers.unflatten(-1, (scales.shape[-1], -1))
        return (groups * scales.unsqueeze(-1) + biases).flatten(-2)
    stored = words.contiguous().view(torch.uint8)
    values = four_bit(stored, E2M1) if bits == 4 else eight_bit(stored.view(torch.float8_e4m3fn))
    nv = mode == "nvfp4"
    scales = scales.view(torch.float8_e4m3fn).float() if nv else power_of_two(scales)
    groups = values.unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
