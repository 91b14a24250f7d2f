"""FP8: weights in eight-bit floats with a scale for a block, a row, an expert or the whole tensor.

Block scales are what DeepSeek-V3 is published with (`weight_scale_inv`, which in spite of its name
is multiplied), and Qwen3, GLM and MiniMax after it; a scale for a row is fbgemm's `weight_scale`,
one for a tensor ModelOpt's. The product is float32, as `Fp8Dequantize` of transformers has it
before it casts; where a shape is no multiple of the block, the last blocks are cut short, as in
`weight_dequant` of DeepSeek.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, TensorLocation
from secateur.checkpoints.quantised.packed import (
    FLOAT8,
    Decoded,
    Packed,
    QuantisedFolder,
    Steps,
    eight_bit,
    power_of_two,
    scale_steps,
    scaled,
)

SCALES = ("_scale_inv", "_scale")
"""What a scale is called behind the name of its tensor."""
ACTIVATIONS = (
    ".activation_scale",
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".kv_scale",
    ".kv_cache_scaling_factor",
)
"""Scales of activations, which a plain model does not have."""
METHODS = ("fp8", "fbgemm_fp8", "mxfp8", "modelopt")


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, scales are beside eight-bit floats."""
    method = source.settings.get("quant_method")
    places = source.checkpoint.places.items()
    eight = [Packed(source.checkpoint, name) for name, one in places if one.dtype in FLOAT8]
    return method in METHODS or (method is None and any(map(scale_of, eight)))


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every tensor that is stored in FP8."""
    block = block_size(source.settings)
    tensors, kinds = dict[str, Any](activation_scales(source)), set[str]()
    for name, place in source.checkpoint.places.items():
        packed = Packed(source.checkpoint, name)
        if place.dtype in FLOATS and len(place.shape) > 1 and scale_of(packed):
            raise packed.bad(
                f"is plain ({place.dtype}), and has scales of packed weights beside it"
            )
        if place.dtype in FLOAT8 and (scale := scale_of(packed)):
            tensors |= eight_bit_float(packed, scale, block)
            kinds.add(_in_words(place, packed.place(scale), block))
    return " and ".join(sorted(kinds)), tensors


def block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block that the settings name, [rows, columns]; None where they name none."""
    sizes = settings.get("weight_block_size")
    if isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(n, int) for n in sizes):
        return (sizes[0], sizes[1]) if min(sizes) > 0 else None
    return None


def activation_scales(source: QuantisedFolder) -> Decoded:
    """The tensors that hold scales of activations: they become nothing."""
    return dict.fromkeys(n for n in source.checkpoint.places if n.endswith(ACTIVATIONS))


def scale_of(packed: Packed) -> str:
    """The part that holds the scales of a tensor; empty where there is none."""
    return next((scale for scale in SCALES if packed.has(scale)), "")


def _in_words(place: TensorLocation, scale: TensorLocation, block: tuple[int, int] | None) -> str:
    if all(size == 1 for size in scale.shape):
        return "FP8 with a scale for a tensor"
    rows, columns = scale_steps(place.shape, scale.shape, block)[-2:]
    if scale.shape[-1:] == (1,) or len(scale.shape) == 1:
        return "FP8 with a scale for a row"
    return f"block FP8 ({rows} x {columns})"


def eight_bit_float(packed: Packed, scale: str, block: tuple[int, int] | None) -> Decoded:
    """A tensor whose scales are the part `scale`. Raises BadCheckpoint where they do not fit it."""
    shape = packed.place("").shape
    given = packed.place(scale, ["U8", "F8_E8M0", *FLOATS]).shape
    steps = scale_steps(shape, given, block)
    if len(shape) < 2 or not all(steps):
        raise packed.bad(f"has scales of shape {list(given)} for weights of shape {list(shape)}")
    decode = partial(_rows, packed, scale, steps)
    return packed.dense("", shape, decode, packed.place("").dtype, ("", scale))


def _rows(packed: Packed, scale: str, steps: Steps, start: int, stop: int) -> Tensor:
    """Rows of a matrix, or experts, as float32."""
    values, scales = eight_bit(packed.tensor("")[start:stop]), packed.tensor(scale)
    exponents = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
    scales = power_of_two(scales) if exponents else scales.float()
    return scaled(values, scales, packed.place("").shape, steps, start)
