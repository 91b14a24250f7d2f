"""The values that kept weights may have: number grids of few bits, and a scale for every group.

A weight is a level of the grid times the scale of its group of consecutive inputs, rounded to the
dtype in which the checkpoint stores it. 0 is a level of every grid, so a weight that is pruned is
exactly zero. How they are written; `parse_values` reads what `str` writes:

    int8                           a scale for each row
    int4, int3, int2               a scale for each 128 inputs; `int4 of group 32`, `int4 of row`
    int4 asymmetric of group 64    with an integer zero point, so that 0 is a level still
    int4 of group 64 by sweep      levels chosen by another of `SOLVERS` (rounding.py)
    fp8                            e4m3, a scale for each row
    nvfp4                          e2m1, a scale of 4 significant bits for each 16 inputs
    mxfp4                          e2m1, a power of two for each 32 inputs

Scales of integers and of fp8 have the 8 significant bits of bfloat16, which float16 holds as well,
and those of nvfp4 the 4 of e4m3; a format's own factor for all of a matrix is a power of two.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import BadPattern, UnknownName
from secateur.kernels.rounding import Levels

AS_STORED = "as stored"
"""No grid: values have the dtype of the checkpoint."""
SOLVERS = ("descent", "sweep", "act-order", "nearest", "joint")
"""What chooses levels and scales, the best of those for a mask that is given first."""


class Grid(NamedTuple):
    """Levels of so many `bits`, and the scales that they may have.

    `scale_bits`: the significant bits of a scale; `scale_size`: the bits in which it is stored.
    `groups`: the inputs that may share one, None for all of a row; the first is the usual.
    """

    bits: int
    levels: Levels
    scale_bits: int
    scale_size: int
    groups: tuple[int | None, ...]

    @property
    def most(self) -> float:
        """The largest magnitude of a level; of an asymmetric grid of integers 2^bits − 1."""
        return max(-self.levels.lowest, self.levels.highest)


def _integers(bits: int, groups: tuple[int | None, ...]) -> Grid:
    half = 2.0 ** (bits - 1)
    return Grid(bits, Levels(-half, half - 1, 0.0, 1.0), 8, 16, groups)


_SMALL: tuple[int | None, ...] = (128, 64, 32, None)
_E2M1 = Levels(-6.0, 6.0, 0.5, 0.5)
GRIDS: dict[str, Grid] = {
    "int8": _integers(8, (None, 128, 64, 32)),
    "int4": _integers(4, _SMALL),
    "int3": _integers(3, _SMALL),
    "int2": _integers(2, _SMALL),
    "fp8": Grid(8, Levels(-448.0, 448.0, 2.0**-3, 2.0**-9), 8, 16, (None,)),
    "nvfp4": Grid(4, _E2M1, 4, 8, (16,)),
    "mxfp4": Grid(4, _E2M1, 1, 8, (32,)),
}
"""Every grid by name."""


class Codes(NamedTuple):
    """A matrix `[out, in]` in levels: `levels` float32 `[out, in]`, `scales` float32 `[out,
    groups]`, and `zero_points` float32 `[out, groups]`, what is added to a level for its code.
    """

    levels: Tensor
    scales: Tensor
    zero_points: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the levels stand for, `[out, in]`, zeros +0.0."""
        groups = self.levels.unflatten(1, (self.scales.shape[1], -1))
        return (groups * self.scales[..., None]).flatten(1).to(dtype) + 0


@dataclass(frozen=True)
class Values:
    """A grid of `GRIDS` by `name`, and how many inputs share a scale; None: all of a row.

    `solver` is what chooses the levels, of `SOLVERS`; the first is the usual.
    """

    name: str
    group: int | None
    asymmetric: bool = False
    solver: str = SOLVERS[0]

    def __str__(self) -> str:
        by = "" if self.solver == SOLVERS[0] else f" by {self.solver}"
        if len(self.grid.groups) == 1 or (self.name, self.group) == ("int8", None):
            return self.name + " asymmetric" * self.asymmetric + by
        shared = "row" if self.group is None else f"group {self.group}"
        return f"{self.name}{' asymmetric' * self.asymmetric} of {shared}{by}"

    @property
    def grid(self) -> Grid:
        return GRIDS[self.name]

    @property
    def scale_bits(self) -> float:
        """Bits of a group's scale, and of its zero point where it has one."""
        return self.grid.scale_size + self.grid.bits * self.asymmetric

    def groups(self, columns: int) -> int:
        """How many groups a row of so many inputs has."""
        return 1 if self.group is None else columns // self.group

    def check(self, shape: tuple[int, int], name: str, *, can_skip: bool = True) -> None:
        """Raise BadPattern where the groups do not divide the inputs of a matrix `[out, in]`.

        `can_skip`: whether the user may leave the matrix out, with --skip.
        """
        if self.group and shape[1] % self.group:
            ways = [f"leave it out with --skip '*{name.rsplit('.', 1)[-1]}'"] * can_skip
            fits = (g for g in self.grid.groups if g is None or not shape[1] % g)
            ways += [f"say '{replace(self, group=group)}'" for group in fits][:1]
            way = " or ".join(ways) or "choose other values"
            raise BadPattern(
                f"{self} needs inputs in groups of {self.group}; {name} has {shape[1]}. "
                f"{way[0].upper()}{way[1:]}."
            )

    def nearest(self, ratios: Tensor, zero_points: Tensor | None = None) -> Tensor:
        """The levels nearest to weights over their scales.

        `zero_points`, which broadcast to them, say where the codes of an asymmetric grid lie;
        without them, any level is let in that some zero point would.
        """
        levels = self.grid.levels
        if not self.asymmetric:
            return levels.nearest(ratios)
        if zero_points is not None:
            return levels.nearest(ratios, zero_points)
        most = 2**self.grid.bits - 1
        return levels.unbounded(ratios).clamp(-most, most)

    def holds(self, levels: Tensor) -> Tensor:
        """Whether the grid can have such levels `[groups, inputs]` in a group, bool `[groups]`."""
        lowest, highest = levels.amin(1).clamp_max(0), levels.amax(1).clamp_min(0)
        if self.asymmetric:
            return highest - lowest < 2**self.grid.bits
        return (lowest >= self.grid.levels.lowest) & (highest <= self.grid.levels.highest)

    @property
    def zero_point(self) -> float:
        """The code of level 0 where the grid is not asymmetric."""
        return 0.0 if self.grid.levels.share else -self.grid.levels.lowest

    def scales_of(self, weight: Tensor, share: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Scales and zero points `[…, out, groups]` for weights `[out, groups, inputs]`.

        The largest weight of a group is `share` times the highest level; of an asymmetric grid, the
        span of a group that of all levels.
        """
        if not self.asymmetric:
            scales = self.storable(share * weight.abs().amax(2) / self.grid.levels.highest)
            return scales, torch.full_like(scales, self.zero_point)
        lowest, highest = weight.amin(2).clamp_max(0), weight.amax(2).clamp_min(0)
        most = 2**self.grid.bits - 1
        scales = self.storable(share * (highest - lowest) / most)
        return scales, (-lowest * share / scales).round().clamp(0, most)

    def storable(self, scales: Tensor) -> Tensor:
        """The scales, float32, rounded to what can be stored; 1 for what is not positive."""
        mantissa, exponent = torch.frexp(scales)  # mantissa in ½ … 1
        steps = 2.0**self.grid.scale_bits
        rounded = torch.ldexp((mantissa * steps).round() / steps, exponent)
        return torch.where(rounded > 2.0**-100, rounded, torch.ones_like(rounded))


def parse_values(text: str) -> Values | None:
    """The values that `text` names, None for `as stored`. Raises BadPattern, UnknownName."""
    if text.strip() == AS_STORED:
        return None
    match = re.fullmatch(
        r"(\w+)( asymmetric)?(?: of (?:group )?(\d{1,6}|row))?(?: by ([\w-]+))?", text.strip()
    )
    grid = match and GRIDS.get(match[1])
    if not match or not grid:
        raise BadPattern(
            f"{text!r} is no kind of values. Say '{AS_STORED}', {', '.join(GRIDS)}, "
            "'int4 of group 64', 'int4 of row' or 'int4 asymmetric'."
        )
    if match[2] and grid.levels.share:
        raise BadPattern(
            f"{match[1]} has levels of both signs and no zero point; found {text!r}. "
            f"Say '{match[1]}', or 'int4 asymmetric'."
        )
    group = grid.groups[0] if not match[3] else None if match[3] == "row" else int(match[3])
    if group not in grid.groups:
        sizes = ", ".join("row" if size is None else f"group {size}" for size in grid.groups)
        raise BadPattern(f"{match[1]} is stored with a scale of {sizes}; found {text!r}.")
    if (solver := match[4] or SOLVERS[0]) not in SOLVERS:
        raise UnknownName("way to choose levels", solver, SOLVERS)
    return Values(match[1], group, bool(match[2]), solver)


def nearest_codes(weight: Tensor, values: Values) -> Codes:
    """The nearest codes of a matrix `[out, in]`, float32: the largest weight of a group has the
    highest level.
    """
    groups = weight.float().unflatten(1, (values.groups(weight.shape[1]), -1))
    scales, zero_points = values.scales_of(groups)
    levels = values.nearest(groups / scales[..., None], zero_points[..., None])
    return Codes(levels.flatten(1) + 0, scales, zero_points)


def find_codes(weight: Tensor, values: Values) -> Codes | None:
    """The levels and scales whose products are a stored matrix `[out, in]` to the bit.

    None where it does not lie on the grid. A group may lie on more than one; that with the highest
    levels is given.
    """
    out, columns = weight.shape
    if values.group and columns % values.group:
        return None
    groups = weight.reshape(-1, values.group or columns)  # [out · groups, inputs]
    levels = torch.zeros(groups.shape, dtype=torch.float32, device=weight.device)
    scales = torch.ones(len(groups), dtype=torch.float32, device=weight.device)
    left = groups.ne(0).any(1).nonzero()[:, 0]
    largest, some = groups[left].abs().amax(1).float(), groups[left, :: _stride(groups.shape[1])]
    for candidate in _candidates(values):
        if not len(left):
            break
        scale = candidate(largest)
        here = _may_match(some, scale, values).nonzero()[:, 0]
        chosen = groups[left[here]]
        nearest = values.nearest(chosen.float() / scale[here, None])
        level, right = _matching(nearest, scale[here], chosen, values)
        if not right.any():
            continue
        found, here = left[here[right]], here[right]
        levels[found], scales[found] = level[right], scale[here]
        others = torch.ones_like(left, dtype=torch.bool).index_fill(0, here, False)
        left, largest, some = left[others], largest[others], some[others]
    if len(left):
        return None
    zero_points = torch.full_like(scales, values.zero_point)
    if values.asymmetric:
        zero_points = -levels.amin(1).clamp_max(0)
    shape = (out, values.groups(columns))
    return Codes(levels.reshape(out, columns), scales.view(shape), zero_points.view(shape))


def _stride(inputs: int) -> int:
    """The distance of the weights that are looked at before the others, in a group of inputs."""
    return max(1, inputs // 16)


def _may_match(some: Tensor, scales: Tensor, values: Values) -> Tensor:
    """In which groups scales may be those of all weights, by `some` `[groups, inputs]` of them."""
    levels = values.nearest(some.float() / scales[:, None])
    beside = (0, 1, -1) if values.asymmetric else (0,)
    match = [((levels + step) * scales[:, None]).to(some.dtype) == some for step in beside]
    return torch.stack(match).any(0).all(1)


def _matching(
    levels: Tensor, scales: Tensor, weight: Tensor, values: Values
) -> tuple[Tensor, Tensor]:
    """Levels `[groups, inputs]`, and in which groups they are the weights to the bit.

    Weights in 16 bits tell no level of 255 from its neighbour, so those nearest may span one more
    than an asymmetric grid has; then the outermost of one end are its neighbours. And the nearest
    may be another weight when it is stored, where its neighbour is this one.
    """

    def right(levels: Tensor) -> Tensor:
        same = (levels * scales[:, None]).to(weight.dtype) == weight
        return same.all(1) & values.holds(levels)

    if values.asymmetric:
        for beside in (levels + 1, levels - 1):
            wrong = (levels * scales[:, None]).to(weight.dtype) != weight
            better = wrong & ((beside * scales[:, None]).to(weight.dtype) == weight)
            levels = torch.where(better, beside, levels)
    matching = right(levels)
    if values.asymmetric:
        most = 2**values.grid.bits - 1
        highest = levels.amax(1, keepdim=True).clamp_min(0)
        lowest = levels.amin(1, keepdim=True).clamp_max(0)
        for other in (levels.clamp_min(highest - most), levels.clamp_max(lowest + most)):
            mended = right(other) & ~matching
            levels = torch.where(mended[:, None], other, levels)
            matching |= mended
    return levels, matching


def _candidates(values: Values) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the scale of a group may be, for the weight of its largest magnitude `[groups]`: the
    highest level first, and scales beside, since weight and scale are rounded.
    """
    grid = values.grid
    most = 2**grid.bits - 1 if values.asymmetric else grid.most
    magnitudes = [float(level) for level in range(int(most), 0, -1)]
    if grid.levels.share:
        step = grid.levels.step
        every = torch.arange(1, int(grid.most / step) + 1) * step
        magnitudes = sorted(set(values.nearest(every).tolist()), reverse=True)
    for magnitude in magnitudes:
        for beside in (0, 1, -1):
            yield lambda largest, magnitude=magnitude, beside=beside: _beside(
                values, largest.abs() / magnitude, beside
            )


def _beside(values: Values, scales: Tensor, steps: int) -> Tensor:
    """The storable scale so many steps beside the nearest one."""
    near = values.storable(scales)
    spacing = torch.exp2(torch.frexp(near).exponent.float() - values.grid.scale_bits)
    return values.storable(near + steps * spacing)
