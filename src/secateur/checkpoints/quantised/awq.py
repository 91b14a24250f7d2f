"""AWQ in the gemm packing: four bits, packed along the outputs in the order 0 2 4 6 1 3 5 7.

`qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8], `scales` [groups, out]. A weight is
`(number - zero) * scale` in the dtype of the scales, as `dequantize_gemm` of AutoAWQ has it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.packed import WORDS, Decoded, Packed, QuantisedFolder, unpacked
from secateur.errors import UnsupportedModel

PARTS = ("qweight", "qzeros", "scales")
BITS = 4
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the eight numbers lie that follow one another."""


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, weights are packed along the outputs."""
    method = source.settings.get("quant_method")
    if method == "auto-round":
        return "awq" in str(source.settings.get("packing_format"))
    if "w_bit" in source.settings:  # the quant_config.json of AWQ itself
        return True
    return method == "awq" or (method is None and any(source.packed(".qweight")))


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every packed matrix. Raises UnsupportedModel for other packings."""
    settings = source.settings
    named = (settings.get(key) for key in ("version", "checkpoint_format", "format"))
    packing = str(next(filter(None, named), "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if packing != "gemm" or bits != BITS:
        raise UnsupportedModel(
            f"{source.checkpoint.folder} holds AWQ weights of {bits} bits packed as {packing}; 4 "
            "bits as gemm were wanted. Save them again so, or name the unquantised model."
        )
    tensors: Decoded = {}
    groups = set[int]()
    for packed in source.packed("qweight"):
        tensors |= _matrix(packed)
        groups.add(packed.place("qweight").shape[0] // packed.place("scales").shape[0])
    sizes = " and ".join(map(str, sorted(groups)))
    return f"AWQ 4-bit, groups of {sizes}", tensors


def _matrix(packed: Packed) -> Decoded:
    place = packed.place("qweight", WORDS)
    if len(place.shape) != 2 or len(packed.place("scales", list(FLOATS)).shape) != 2:
        raise packed.bad(f"has qweight of shape {list(place.shape)}; two dimensions were wanted")
    inputs, words = place.shape
    groups = packed.place("scales").shape[0]
    packed.require("scales", (groups, 8 * words))
    packed.require("qzeros", (groups, words), WORDS)
    if not groups or inputs % groups:
        raise packed.bad(f"has {groups} groups for {inputs} inputs")
    shape = (8 * words, inputs)
    return packed.dense("weight", shape, partial(_rows, packed), "AWQ 4-bit", PARTS)


def _rows(packed: Packed, start: int, stop: int) -> Tensor:
    """Rows [count, in] in the dtype of the scales."""
    words = slice(start // 8, stop // 8)
    numbers = _numbers(packed.tensor("qweight")[:, words])  # [in, out]
    zeros = _numbers(packed.tensor("qzeros")[:, words])
    scales = packed.tensor("scales")[:, start:stop]
    each = numbers.shape[0] // scales.shape[0]
    difference = numbers.short() - zeros.short().repeat_interleave(each, 0)
    return (difference * scales.repeat_interleave(each, 0)).T


def _numbers(words: Tensor) -> Tensor:
    """The numbers [rows, 8 words] of words, in the order of the outputs."""
    numbers = unpacked(words, BITS, 8 * words.shape[-1])
    return numbers.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER)].flatten(-2)
