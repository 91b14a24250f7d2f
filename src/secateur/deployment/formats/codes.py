"""The levels and scales of a weight matrix, for the formats that store values of few bits.

What was pruned with `--values` lies on a grid, and its codes come back to the bit. Any other matrix
is rounded to the nearest level; zeros are level 0 of every grid, so they stay. Nothing is looked at
but the weights: rounding that minimises what the model's outputs lose is `prune --values`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.quantised.packed import E2M1
from secateur.checkpoints.record import record_of
from secateur.errors import BadPattern, UnknownName
from secateur.methods.values import Codes, Values, find_codes, nearest_codes, parse_values


class Coded(NamedTuple):
    """The codes of a matrix, and whether it had to be `rounded` since it did not lie on them."""

    codes: Codes
    rounded: bool


def codes_of(weight: Tensor, values: Values) -> Coded:
    """The codes of a weight matrix `[out, in]`: those that it was made of, else the nearest.

    A group that is rounded has a scale with which its largest weight is the highest level. The
    groups must divide the inputs (`Values.check`), and the weights be finite.
    """
    codes = find_codes(weight, values)
    return Coded(nearest_codes(weight, values), True) if codes is None else Coded(codes, False)


def _grouped(weight: Tensor, values: Values) -> Tensor:
    """The weights in float32, `[out, groups, inputs]`."""
    return weight.float().unflatten(1, (values.groups(weight.shape[1]), -1))


def with_scales(coded: Coded, weight: Tensor, values: Values, scales: Tensor) -> Coded:
    """The codes with the `scales` `[out, groups]` that a format can hold.

    A group that gets another scale gets the levels that are nearest with that one; one of nothing
    but zeros may have any.
    """
    other = scales != coded.codes.scales
    if not other.any():
        return coded
    groups, zero_points = _grouped(weight, values), coded.codes.zero_points
    nearest = values.nearest(groups / scales[..., None], zero_points[..., None])
    levels = torch.where(other[..., None], nearest, _grouped(coded.codes.levels, values))
    rounded = coded.rounded or bool((other & groups.any(2)).any())
    return Coded(Codes(levels.flatten(1) + 0, scales, zero_points), rounded)


def held_in(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales as a dtype of floats can have them, in float32; never 0."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a subnormal
    return scales.to(dtype).float().clamp_min(smallest)


def exponents(scales: Tensor) -> Tensor:
    """Powers of two as e8m0 has them: the exponent + 127, uint8."""
    return (torch.frexp(scales).exponent + 126).to(torch.uint8)  # of ½ · 2^e


def e2m1_codes(levels: Tensor) -> Tensor:
    """The four bits of levels of e2m1, uint8 of the same shape."""
    magnitudes = torch.tensor(E2M1[:8], device=levels.device)
    codes = torch.searchsorted(magnitudes, levels.abs().contiguous()).to(torch.uint8)
    return codes + 8 * (levels < 0).to(torch.uint8)


def values_of(folder: Path) -> Values | None:
    """The values that a checkpoint was pruned with, None where its record names no grid."""
    text = (record_of(folder) or {}).get("values")
    try:
        return parse_values(text) if isinstance(text, str) else None
    except (BadPattern, UnknownName):  # of a version with other grids
        return None


def left_out(folder: Path) -> frozenset[str]:
    """The weight matrices that a pruning with values left as they were, by module."""
    record = record_of(folder) or {}
    if not record.get("values"):
        return frozenset()
    sites = record.get("sites") or []
    return frozenset(site["site"] for site in sites if site.get("pattern") is None)


def rounding_note(values: Values, rounded: list[str], matrices: int) -> str | None:
    """What to say where matrices did not lie on the grid, None where all did."""
    if not rounded:
        return None
    names = ", ".join(rounded[:3]) + (" …" if len(rounded) > 3 else "")
    return (
        f"{len(rounded)} of {matrices} matrices did not lie on {values} and were rounded to "
        f"nearest: {names}. Rounding that spares the outputs is 'secateur prune --values'."
    )
