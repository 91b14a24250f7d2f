"""Packs matrices with the values that are wanted, some rows at a time so that little is in memory.

Where weights lie on the grid of the values, as `prune --values` leaves them, their levels and
scales are found to the bit. Anywhere else they are rounded to the nearest level, the largest weight
of a group being the highest one; those that come to less than half a step are zero then.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import BadPattern
from secateur.kernels.packed import WORD, Packed, joined, pack, pack_int8, pack_levels
from secateur.methods.values import (
    AS_STORED,
    SOLVERS,
    Codes,
    Values,
    find_codes,
    nearest_codes,
    parse_values,
)
from secateur.system.tensors import count_zeros

INTEGERS = ("int8", "int4", "int3", "int2")
"""The grids that packed matrices can have."""
PACKED_VALUES = (AS_STORED, "int8", "int4", "int4 of group 64", "int4 of row", "int3", "int2")
"""What can be said of the values, for errors."""
LEAST = 0.4
"""The share of zeros from which a layer is packed: under it bfloat16 is small enough as it is."""
ROWS = 128
"""How many rows are packed at a time."""


def packed_values(text: str) -> Values | None:
    """The values that `text` names, None for as stored. Raises BadPattern for those that there are
    no packed products for.
    """
    values = parse_values(text)
    if values is None:
        return None
    if not can_pack(values):
        raise BadPattern(
            f"Packed matrices have no values of {values}. Say "
            f"{', '.join(map(repr, PACKED_VALUES[:-1]))} or {PACKED_VALUES[-1]!r}."
        )
    return replace(values, solver=SOLVERS[0])


def can_pack(values: Values) -> bool:
    """Whether there are packed products for values: integers, with a scale for whole words."""
    whole_words = values.group is None or (values.name != "int8" and values.group % WORD == 0)
    return values.name in INTEGERS and not values.asymmetric and whole_words


def fitting(values: Values, columns: int) -> Values:
    """These values, with the largest group, but for theirs, that divides so many inputs."""
    groups = (values.group, *(group for group in (128, WORD) if group < (values.group or 0)), None)
    fits = next(group for group in groups if group is None or columns % group == 0)
    return Values(values.name, fits)


def check_groups(values: Values | None, columns: int, name: str) -> None:
    """Raise BadPattern where the groups do not divide the inputs of a matrix."""
    if values and values.group and columns % values.group:
        raise BadPattern(
            f"{values} needs inputs in groups of {values.group}; {name} has {columns}. "
            f"Say '{fitting(values, columns)}'."
        )


def rows_of(source: Checkpoint, name: str) -> Iterator[Tensor]:
    """Some rows of a matrix at a time, mapped from its shard as long as they are used."""
    rows = source.places[name].shape[0]
    for start in range(0, rows, ROWS):
        yield source.rows(name, start, min(start + ROWS, rows))


def enough_zeros(source: Checkpoint, name: str) -> bool:
    """Whether a matrix of a checkpoint has a share `LEAST` of zeros."""
    rows, columns = source.places[name].shape
    return sum(map(count_zeros, rows_of(source, name))) >= LEAST * rows * columns


def pack_rows(parts: Iterable[Tensor], values: Values | None) -> tuple[Packed, bool]:
    """Pack a matrix that comes some rows at a time; also whether it comes back to the bit.

    `values` None: as they are. Raises BadPattern and BadCheckpoint.
    """
    packed: list[Packed] = []
    exact = True
    for weight in parts:
        if values is None:
            packed.append(pack(weight))
            continue
        codes = _codes(weight, values) if exact else None
        exact = codes is not None
        packed.append(_pack_codes(codes, weight, values))
    return joined(packed), exact


def pack_matrix(weight: Tensor, values: Values | None) -> Packed:
    """Pack a matrix `[rows, columns]` on the CPU."""
    return pack_rows(weight.split(ROWS), values)[0]


def _codes(weight: Tensor, values: Values) -> Codes | None:
    """The codes of some rows, None off the grid: a row tells soon, all of them only at length."""
    filled = weight.count_nonzero(1).nonzero()[:1, 0]
    if find_codes(weight[filled], values) is None:
        return None
    return find_codes(weight, values)


def _pack_codes(codes: Codes | None, weight: Tensor, values: Values) -> Packed:
    if values.name != "int8":
        codes = codes or nearest_codes(weight, values)
        return pack_levels(codes.levels, codes.scales, values.grid.bits)
    if codes is None:
        return pack_int8(weight)
    return replace(pack(codes.levels.to(torch.int8)), scales=codes.scales[:, 0].contiguous())
