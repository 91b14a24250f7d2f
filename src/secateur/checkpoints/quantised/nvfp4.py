"""ModelOpt's checkpoints: NVFP4 and, in the same folder or alone, FP8.

`weight` uint8 [out, in/2] holds two four-bit floats a byte, `weight_scale` float8 [out, in/16] a
scale for sixteen, `weight_scale_2` one for the tensor; all three are multiplied in float32, as
`NVFP4QTensor.dequantize` does. Of FP8 that is `fp8`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from secateur.checkpoints.quantised import fp8
from secateur.checkpoints.quantised.packed import E2M1, Decoded, Packed, QuantisedFolder, four_bit

WEIGHT, SCALE, SCALE_2 = "weight", "weight_scale", "weight_scale_2"
TABLE = (*E2M1[:8], 0.0, *E2M1[9:])
"""ModelOpt has no negative zero."""


def recognised(source: QuantisedFolder) -> bool:
    """Whether the second scale is there, whatever the settings call it."""
    method = source.settings.get("quant_method")
    twice = any(name.endswith(f".{SCALE_2}") for name in source.checkpoint.places)
    return twice and method in (None, "modelopt", "modelopt_fp4", "nvfp4")


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every tensor that is stored in NVFP4 or FP8."""
    words, tensors = fp8.decoded(source)
    for packed in source.packed(SCALE_2):
        packed.place(WEIGHT)
        if packed.has("pre_quant_scale"):
            raise packed.bad("has a pre_quant_scale, which would have to go into what is before it")
        if packed.place(WEIGHT).dtype == "U8":
            tensors |= _matrix(packed)
    return " and ".join(filter(None, ("NVFP4", words))), tensors


def _matrix(packed: Packed) -> Decoded:
    *rows, half = packed.place(WEIGHT, ["U8"]).shape or (0,)
    *_, groups = packed.place(SCALE, ["F8_E4M3"]).shape or (0,)
    packed.require(SCALE, (*rows, groups), ["F8_E4M3"])
    if not groups or 2 * half % groups or packed.place(SCALE_2, ["F32"]).bytes != 4:
        raise packed.bad(
            f"has scales of shape {list(packed.place(SCALE).shape)} and "
            f"{list(packed.place(SCALE_2).shape)} for {2 * half} inputs"
        )
    shape = (*rows, 2 * half)
    parts = (WEIGHT, SCALE, SCALE_2)
    return packed.dense(WEIGHT, shape, partial(_rows, packed), "NVFP4", parts)


def _rows(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows [count, in] float32."""
    values = four_bit(packed.tensor(WEIGHT)[start:stop], TABLE)
    scales = packed.tensor(SCALE)[start:stop].float() * packed.tensor(SCALE_2).reshape(())
    groups = values.unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.unsqueeze(-1)).flatten(-2)
