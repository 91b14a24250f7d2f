"""GGUF's blocks of weights: of 32, filled with the levels of a grid, and of 256 in six bits.

    Q8_0     a float16 scale, 32 levels as int8
    Q4_0     a float16 scale, 16 bytes: level i + 8 in the low half of byte i, level i + 16 in the
             high half
    Q6_K     of 256: low four bits of level + 32, high two, int8 scales for 16, a float16 factor
    MXFP4    the exponent of the scale + 127, 16 bytes as in Q4_0, of the codes of e2m1

Level 0 is 0 in each of them. In Q4_1, which asymmetric grids would need, numbers count
from a minimum in float16, and none need be 0. No blocks have a scale for 64 or 128 weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.deployment.formats.codes import codes_of, e2m1_codes, exponents, held_in, with_scales
from secateur.errors import BadPattern, NonFinite, UnknownName
from secateur.methods.values import GRIDS, Values, parse_values

GRID_TYPES = {"int8 of group 32": "Q8_0", "int4 of group 32": "Q4_0", "mxfp4": "MXFP4"}
"""The `GGMLQuantizationType` of every grid that has one."""
HALF = 16
OF_SIX_BITS = 256
"""Weights in a block of Q6_K, which is none of a grid: its scales are products."""


def type_of(values: Values) -> str | None:
    """The `GGMLQuantizationType` that has the levels of a grid, None where there is none."""
    plain = Values(values.name, values.group, values.asymmetric)
    return GRID_TYPES.get(str(plain))


def find_grid(text: str, others: tuple[str, ...]) -> Values | None:
    """The grid that a user names, None for one of the `others`. Raises UnknownName, BadPattern."""
    if text in others:
        return None
    if not text.split() or text.split()[0] not in GRIDS:
        raise UnknownName("kind of GGUF values", text, [*others, *GRID_TYPES])
    values = parse_values(text)
    if values is None or type_of(values) is None:
        raise BadPattern(
            f"GGUF has no blocks for {values}. Say --values "
            f"{' or '.join(repr(grid) for grid in GRID_TYPES)}, and prune with the same."
        )
    return values


def blocks(weight: Tensor, values: Values, name: str) -> tuple[np.ndarray, bool]:
    """A matrix `[out, in]` as the bytes of its blocks, uint8 `[out, bytes]`, and whether it was
    rounded. Raises NonFinite where float16 cannot hold a scale.
    """
    coded = codes_of(weight, values)
    if values.name != "mxfp4":
        scales = coded.codes.scales
        _refuse_overflow(scales, type_of(values), name)
        coded = with_scales(coded, weight, values, held_in(scales, torch.float16))
    levels = coded.codes.levels.unflatten(1, (-1, 2 * HALF))  # [out, blocks, 32]
    if values.name == "mxfp4":
        head, codes = exponents(coded.codes.scales)[..., None], e2m1_codes(levels)
    else:
        head = coded.codes.scales.half()[..., None].view(torch.uint8)
        codes = (levels + 8).to(torch.uint8)
    body = codes[..., :HALF] | codes[..., HALF:] << 4
    if values.name == "int8":
        body = levels.to(torch.int8).view(torch.uint8)
    return torch.cat([head, body], -1).flatten(1).numpy(), coded.rounded


def six_bits(weight: Tensor, name: str) -> np.ndarray:
    """A matrix `[out, in]` rounded to nearest as the bytes of Q6_K, uint8 `[out, bytes]`; the
    largest weight of 16 is level -32. Zeros stay. Raises NonFinite where float16 cannot hold a
    factor.
    """
    groups = weight.float().unflatten(1, (-1, OF_SIX_BITS // 16, 16))  # [out, blocks, 16, 16]
    wanted = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -32
    factors = wanted.abs().amax(-2, keepdim=True) / 127
    _refuse_overflow(factors, "Q6_K", name)
    factors = held_in(factors, torch.float16)
    scales = (wanted / factors).round().clamp(-128, 127)
    levels = (groups / (factors * scales)).nan_to_num(0.0, 0.0, 0.0).round().clamp(-32, 31)
    codes = (levels + 32).to(torch.uint8).flatten(-2).unflatten(-1, (2, 4, 32))
    low, high = codes & 15, codes >> 4  # [out, blocks, halves, quarters, 32]
    lows = low[..., :2, :] | low[..., 2:, :] << 4
    highs = (high << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(-2).to(torch.uint8)
    parts = lows.flatten(-3), highs.flatten(-2), scales.to(torch.int8).view(torch.uint8).flatten(-2)
    end = factors.half().flatten(-2).view(torch.uint8)
    return torch.cat([*parts, end], -1).flatten(1).numpy()


def _refuse_overflow(scales: Tensor, kind: str | None, name: str) -> None:
    """Raise NonFinite where float16 cannot hold a scale."""
    if (largest := float(scales.max())) > torch.finfo(torch.float16).max:
        raise NonFinite(
            f"{name} has a scale of {largest:.0f}, more than the f16 of {kind} can "
            "hold. Write bf16 or f32."
        )
