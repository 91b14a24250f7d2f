"""MXFP4 as gpt-oss is published in: experts in four-bit floats, 32 with a power of two as scale.

`X_blocks` uint8 [experts, rows, groups, 16] holds two numbers a byte, `X_scales` uint8 [experts,
rows, groups] the exponents. The plain tensor is [experts, 32 groups, rows], bfloat16, as
`convert_moe_packed_tensors` of transformers gives it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from secateur.checkpoints.quantised.packed import (
    E2M1,
    ROWS,
    Decoded,
    Packed,
    QuantisedFolder,
    four_bit,
    looked_up,
)

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
    table = 2 * torch.tensor(E2M1, dtype=torch.bfloat16)
    exponents = torch.arange(256) - 128  # half of the scale, since 2^128 is infinite
    halves = torch.ldexp(torch.ones(256), exponents).bfloat16()
    blocks, powers = packed.tensor(BLOCKS), packed.tensor(SCALES)
    _, out, groups, half = blocks.shape
    experts = torch.empty(stop - start, 2 * half * groups, out, dtype=torch.bfloat16)
    for expert, block, power in zip(experts, blocks[start:stop], powers[start:stop], strict=True):
        for row in range(0, out, ROWS):
            values = four_bit(block[row : row + ROWS], table)  # [rows, groups, 2 half]
            values *= looked_up(power[row : row + ROWS], halves.unsqueeze(-1)).unsqueeze(-1)
            expert[:, row : row + ROWS] = values.flatten(1).T
    return experts
