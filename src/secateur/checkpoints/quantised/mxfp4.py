"""MXFP4 as gpt-oss is published in: experts in four-bit floats, 32 with a power of two as scale.

`X_blocks` uint8 [experts, rows, groups, 16] holds two numbers a byte, `X_scales` uint8 [experts,
rows, groups] the exponents. The plain tensor is [experts, 32 groups, rows], bfloat16, as
`convert_moe_packed_tensors` of transformers gives it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from secateur.checkpoints.quantised.packed import E2M1, Decoded, Packed, QuantisedFolder, four_bit

BLOCKS, SCALES = "_blocks", "_scales"


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, blocks with scales are there."""
    method = source.settings.get("quant_method")
    blocks = any(name.endswith("_proj_blocks") for name in source.checkpoint.places)
    return method == "mxfp4" or (method is None and blocks)


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every tensor that is stored in MXFP4."""
    tensors: Decoded = {}
    for packed in source.packed(BLOCKS):
        blocks = packed.place(BLOCKS, ["U8"]).shape
        if len(blocks) != 4:
            raise packed.bad(f"has blocks of shape {list(blocks)}; four dimensions were wanted")
        packed.require(SCALES, blocks[:-1], ["U8"])
        experts, rows, groups, half = blocks
        shape = (experts, 2 * half * groups, rows)
        decode = partial(_experts, packed)
        tensors |= packed.dense("", shape, decode, "MXFP4", (BLOCKS, SCALES))
    return "MXFP4", tensors


def _experts(packed: Packed, start: int, stop: int) -> Tensor:
    """Experts [count, in, out] bfloat16."""
    values = four_bit(packed.tensor(BLOCKS)[start:stop], E2M1).to(torch.bfloat16)
    exponents = packed.tensor(SCALES)[start:stop].int() - 127
    values = torch.ldexp(values, exponents.unsqueeze(-1))  # [experts, rows, groups, 32]
    return values.flatten(-2).transpose(1, 2).contiguous()
