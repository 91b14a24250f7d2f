"""compressed-tensors: integers of 1 to 8 bits packed in words, bytes, FP8, NVFP4 and MXFP4.

What a module is stored as is read from its parts; the settings say how many bits packed integers
have, and which block shares a scale. A weight is `(number - zero) * scale` in the dtype of the
scales, as `dequantize` of the library has it; four-bit floats come in bfloat16. Sparse formats
are not read here: `export --to dense` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.base import DenseTensor
from secateur.checkpoints.quantised.fp8 import activation_scales, block_size
from secateur.checkpoints.quantised.packed import (
    E2M1,
    FLOAT8,
    Decoded,
    Packed,
    QuantisedFolder,
    Steps,
    eight_bit,
    four_bit,
    power_of_two,
    scale_steps,
    scaled,
    spread,
    unpacked,
)
from secateur.errors import BadCheckpoint, UnsupportedModel, in_one_line

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
OTHERS = ("input_global_scale", "input_zero_point", "output_zero_point")
"""What belongs to activations, besides their scales."""
PARTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale")


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so, and nothing is sparse; or packed weights are there."""
    sparse = source.settings.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        return False
    method = source.settings.get("quant_method")
    known = "config_groups" in source.settings or any(source.packed(".weight_packed"))
    return method == "compressed-tensors" or (method is None and known)


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every tensor that is packed. Raises UnsupportedModel for others."""
    groups = _groups(source.settings)
    for name in (one.get("format") for one in (source.settings, *groups)):
        if name not in (None, *FORMATS):
            raise UnsupportedModel(
                f"{source.checkpoint.folder} is stored as {name} of compressed-tensors; one of "
                f"{', '.join(FORMATS)} was wanted. Name the unquantised model."
            )
    tensors: dict[str, Any] = dict(activation_scales(source))
    tensors |= dict.fromkeys(n for n in source.checkpoint.places if n.endswith(OTHERS))
    kinds = set[str]()
    for packed in source.packed("weight_packed"):
        packed.place("weight_scale")
    for packed in source.packed("weight_scale"):
        settings = _settings_of(packed.prefix.rstrip("."), groups)
        matrix = _matrix(packed, settings)
        tensors |= matrix
        kinds |= {one.stored for one in matrix.values() if isinstance(one, DenseTensor)}
    return f"compressed-tensors {' and '.join(sorted(kinds))}", tensors


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups") or {}
    values = groups.values() if isinstance(groups, dict) else ()
    return [group for group in values if isinstance(group, dict)]


def _settings_of(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the settings say of the weights of a module: the group that names it, else the group
    that names its class, which is the one for "Linear".
    """

    def named(target: str) -> bool:
        if not target.startswith("re:"):
            return target == module
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error as error:
            raise BadCheckpoint(
                f"config.json names modules by {target!r}, which is no regular expression "
                f"({in_one_line(error)}). Fetch it again."
            ) from error

    by_name = [g for g in groups if any(map(named, map(str, _listed(g.get("targets")))))]
    weights = next(iter([*by_name, *groups]), {}).get("weights")
    return weights if isinstance(weights, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _matrix(packed: Packed, settings: Mapping[str, Any]) -> Decoded:
    """The plain weight of a module. Raises BadCheckpoint where its parts do not fit."""
    if not packed.has("weight_packed"):
        return _unpacked_matrix(packed, settings)
    if packed.place("weight_packed").dtype == "U8":
        return _four_bit_matrix(packed)
    bits, shape = settings.get("num_bits"), _shape(packed)
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise packed.bad(f"has integers of {bits} bits, as the settings say; 1 to 8 were wanted")
    packed.require("weight_packed", (shape[0], -(-shape[1] * bits // 32)), ["I32"])
    own = packed.place("weight_scale", list(FLOATS)).shape not in ((), (1,), (1, 1))
    steps = _steps(packed, shape, whole_rows=own)
    if packed.has("weight_zero_point"):
        _check_zeros(packed, bits, shape[0])
    decode = partial(_integers, packed, bits, shape, steps)
    return packed.dense("weight", shape, decode, f"{bits}-bit integers", ("weight_packed", *PARTS))


def _shape(packed: Packed) -> tuple[int, int]:
    """The shape that is stored beside packed integers."""
    packed.require("weight_shape", (2,), ["I64", "I32"])
    rows, columns = packed.tensor("weight_shape").tolist()
    if rows < 0 or columns < 0:
        raise packed.bad(f"says that its shape is {[rows, columns]}")
    return rows, columns


def _check_zeros(packed: Packed, bits: int, rows: int) -> None:
    zeros, scales = packed.place("weight_zero_point"), packed.place("weight_scale").shape
    groups = next(reversed(scales), 1)
    wanted = rows if zeros.dtype != "I32" else -(-rows * bits // 32)
    packed.require("weight_zero_point", (wanted, groups))


def _steps(
    packed: Packed,
    shape: tuple[int, ...],
    block: tuple[int, int] | None = None,
    *,
    whole_rows: bool = False,
) -> Steps:
    """How the scales lie over the weights; with `whole_rows`, each row has its own.

    Raises BadCheckpoint where they do not fit.
    """
    scales = packed.place("weight_scale")
    steps = scale_steps(shape, scales.shape, block)
    if packed.has("weight_g_idx"):
        packed.require("weight_g_idx", (shape[1],), ["I32", "I64"])
        index, groups = packed.tensor("weight_g_idx"), scales.shape[-1]
        steps = (1, 1)
        if scales.shape != (shape[0], groups) or not 0 <= index.min() <= index.max() < groups:
            raise packed.bad(f"has a g_idx that names more groups than the {groups} it has")
    rows_fit = not whole_rows or scales.shape[:1] == shape[:1]
    if len(shape) < 2 or not all(steps) or not rows_fit:
        raise packed.bad(
            f"has scales of shape {list(scales.shape)} for weights of shape {list(shape)}"
        )
    return steps


def _integers(
    packed: Packed, bits: int, shape: tuple[int, int], steps: Steps, start: int, stop: int
) -> Tensor:
    """Rows [count, in] of packed integers, in the dtype of the scales."""
    numbers = unpacked(packed.tensor("weight_packed")[start:stop], bits, shape[1])
    scales = packed.tensor("weight_scale")
    half = 2 ** (bits - 1)
    values = numbers.to(scales.dtype) - half
    if packed.has("weight_zero_point"):
        zeros = packed.tensor("weight_zero_point")
        if zeros.dtype == torch.int32:
            words = zeros[start * bits // 32 : -(-stop * bits // 32)]
            zeros = unpacked(words.T, bits, stop - start).T.to(scales.dtype) - half
        else:
            zeros = zeros[start:stop].to(scales.dtype)
        values -= _over(packed, zeros, shape, steps, stop - start)
    return values * _over(packed, _own_rows(scales, start, stop), shape, steps, stop - start)


def _own_rows(scales: Tensor, start: int, stop: int) -> Tensor:
    return scales[start:stop] if scales.ndim > 1 and scales.shape[0] > 1 else scales


def _over(
    packed: Packed, scales: Tensor, shape: tuple[int, int], steps: Steps, rows: int
) -> Tensor:
    """Scales or zeros of some rows, for each of their weights."""
    if packed.has("weight_g_idx"):
        return scales[:, packed.tensor("weight_g_idx").long()]
    return spread(scales, (rows, shape[1]), (1, *steps[1:]), 0, rows)


def _unpacked_matrix(packed: Packed, settings: Mapping[str, Any]) -> Decoded:
    """A weight whose numbers are a byte each, integers or FP8."""
    place = packed.place("weight", [*FLOAT8, "I8"])
    block = block_size({"weight_block_size": settings.get("block_structure")})
    scales = packed.place("weight_scale", ["U8", *FLOATS])
    steps = _steps(packed, place.shape, block)
    if packed.has("weight_zero_point"):
        packed.require("weight_zero_point", scales.shape)
    stored = "8-bit integers" if place.dtype == "I8" else place.dtype
    decode = partial(_bytes, packed, steps)
    return packed.dense("weight", place.shape, decode, stored, ("weight", *PARTS))


def _bytes(packed: Packed, steps: Steps, start: int, stop: int) -> Tensor:
    """Rows [count, in] of a weight in bytes, in the dtype of the scales."""
    scales, shape = packed.tensor("weight_scale"), packed.place("weight").shape
    if scales.dtype == torch.uint8:
        scales = power_of_two(scales).to(torch.bfloat16)
    stored = packed.tensor("weight")[start:stop]
    values = eight_bit(stored) if stored.is_floating_point() else stored
    values = values.to(scales.dtype)
    if packed.has("weight_zero_point"):
        zeros = packed.tensor("weight_zero_point").to(scales.dtype)
        values = values - spread(zeros, shape, steps, start, stop)
    return scaled(values, scales, shape, steps, start)


def _four_bit_matrix(packed: Packed) -> Decoded:
    """A weight in four-bit floats: NVFP4 where its scales are FP8, MXFP4 where they are powers."""
    *rows, half = packed.place("weight_packed").shape or (0,)
    shape, scales = (*rows, 2 * half), packed.place("weight_scale", ["F8_E4M3", "U8", *FLOATS])
    stored = "MXFP4" if scales.dtype == "U8" else "NVFP4"
    *_, groups = scales.shape or (0,)
    if scales.shape != (*rows, groups) or not groups or 2 * half % groups:
        raise packed.bad(f"has scales of shape {list(scales.shape)} for shape {list(shape)}")
    if stored == "NVFP4" and packed.place("weight_global_scale", ["F32"]).bytes != 4:
        raise packed.bad("has a global scale of several numbers; one was wanted")
    decode = partial(_four_bit_rows, packed)
    return packed.dense("weight", shape, decode, stored, ("weight_packed", *PARTS))


def _four_bit_rows(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows [count, in] bfloat16, multiplied in float32."""
    values = four_bit(packed.tensor("weight_packed")[start:stop], E2M1)
    scales = packed.tensor("weight_scale")[start:stop]
    scales = power_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
    if packed.has("weight_global_scale"):
        scales = scales / packed.tensor("weight_global_scale").reshape(())
    groups = values.unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
