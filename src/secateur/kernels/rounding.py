"""Rounding to grids of few bits: the loops of methods/rounding.py, in C and in torch (round.c).

A level lies between `lowest` and `highest`, or where zero points are given between −zero point and
so much above it; its step is `share` of the power of two under it, at least `step`.
"""

from ctypes import CDLL
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.kernels.library import best, library

ROWS_AT_ONCE = 256
"""Rows of a search of scales in torch, which holds an error for every weight."""


class Levels(NamedTuple):
    """The levels of a grid; those of an integer grid have share 0."""

    lowest: float
    highest: float
    share: float
    step: float

    def nearest(self, ratios: Tensor, zero_points: Tensor | None = None) -> Tensor:
        """The nearest levels, halves to even; `zero_points` broadcast to `ratios`."""
        levels = self.unbounded(ratios)
        if zero_points is None:
            return levels.clamp(self.lowest, self.highest)
        return levels.clamp(-zero_points, -zero_points + self.highest - self.lowest)

    def unbounded(self, ratios: Tensor) -> Tensor:
        """The nearest levels, were there no lowest and no highest."""
        if not self.share:
            return ratios.round()
        exponent = torch.frexp(ratios).exponent - 1  # of 1.m · 2^e
        step = (self.share * torch.exp2(exponent.float())).clamp_min(self.step)
        return (ratios / step).round() * step


def round_columns(
    values: Tensor,
    units: Tensor,
    factor: Tensor,
    levels: Levels,
    *,
    old: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> None:
    """Round the columns of a block `[out, width]` in place, each after the errors before it.

    `values`: what the weights would be; `units`: the weight of level 1, 0 where pruned;
    `zero_points` of every weight. `factor` `[width, width]`, lower triangular: a column takes up
    the errors of earlier ones by its row. With `old`, errors are what a weight is more than it was;
    else what rounding took off, over the diagonal of `factor`. All float32.
    """
    compiled = _compiled(values)
    given = [None if one is None else one.contiguous() for one in (old, units, zero_points, factor)]
    if compiled and values.is_contiguous():
        places = [None if one is None else one.data_ptr() for one in given]
        sizes = (*values.shape, *levels, torch.get_num_threads())
        if compiled.secateur_round_columns(best(), values.data_ptr(), *places, *sizes):
            raise MemoryError(f"There is no memory to round {values.shape[1]} columns at a time.")
        return
    round_columns_in_torch(values, units, factor, levels, old=old, zero_points=zero_points)


def _compiled(weight: Tensor) -> CDLL | None:
    """The library, for weights that it takes."""
    return library() if weight.device.type == "cpu" and weight.dtype == torch.float32 else None


def round_columns_in_torch(
    values: Tensor,
    units: Tensor,
    factor: Tensor,
    levels: Levels,
    *,
    old: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> None:
    """`round_columns` in torch, a column of all rows at a time."""
    for j in range(values.shape[1]):
        weight, unit = values[:, j].clone(), units[:, j]
        zeros = None if zero_points is None else zero_points[:, j]
        ratio = (weight / unit).where(unit > 0, 0.0)
        rounded = levels.nearest(ratio, zeros) * unit
        error = (weight - rounded) / factor[j, j] if old is None else rounded - old[:, j]
        values[:, j] = rounded
        values[:, j + 1 :].addr_(error, factor[j + 1 :, j], alpha=-1)


def best_scales(
    weight: Tensor,
    importance: Tensor,
    scales: Tensor,
    levels: Levels,
    zero_points: Tensor | None = None,
) -> Tensor:
    """Which of several scales rounds a group best, the first of equals: int64 `[out, groups]`.

    `weight` `[out, groups, size]`, `importance` `[groups, size]` of each input, `scales` and
    `zero_points` `[choices, out, groups]`, float32: least is Σ importance · (rounded − weight)².
    """
    compiled = _compiled(weight)
    if compiled is None:
        return best_scales_in_torch(weight, importance, scales, levels, zero_points)
    given = [weight, importance, scales, *([] if zero_points is None else [zero_points])]
    held = [one.contiguous() for one in given]  # alive until the call is over
    places = [one.data_ptr() for one in held] + [None] * (zero_points is None)
    chosen = torch.empty(weight.shape[:2], dtype=torch.int64)
    sizes = (*weight.shape, len(scales), *levels, torch.get_num_threads())
    if compiled.secateur_best_scales(best(), *places, chosen.data_ptr(), *sizes):
        raise MemoryError(f"There is no memory to search scales of {weight.shape[2]} inputs.")
    return chosen


def best_scales_in_torch(
    weight: Tensor,
    importance: Tensor,
    scales: Tensor,
    levels: Levels,
    zero_points: Tensor | None = None,
) -> Tensor:
    """`best_scales` in torch, some rows at a time."""
    parts = []
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        losses = []
        for number, scale in enumerate(scales[:, rows]):
            zeros = None if zero_points is None else zero_points[number, rows][..., None]
            rounded = levels.nearest(weight[rows] / scale[..., None], zeros) * scale[..., None]
            losses.append(((rounded - weight[rows]).square_() * importance).sum(2))
        parts.append(torch.stack(losses).argmin(0))
    return torch.cat(parts)
