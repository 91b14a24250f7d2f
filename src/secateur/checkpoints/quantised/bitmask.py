"""Sparse-24-bitmask and sparse-bitmask of compressed-tensors: a bit for every weight, and those
that are not zero. The layout is told in deployment/formats/compressed_tensors.py, which writes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, Checkpoint
from secateur.checkpoints.quantised.base import DenseTensor
from secateur.checkpoints.quantised.packed import Decoded, QuantisedFolder
from secateur.errors import BadCheckpoint

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


class Bitmask(NamedTuple):
    """One of the two formats: its name, whether it is 2:4, and the parts of a packed weight."""

    name: str
    halves: bool
    parts: tuple[str, ...]


TWO_OF_FOUR_BITMASK = Bitmask("sparse-24-bitmask", True, PARTS[:3])
ANY_BITMASK = Bitmask("sparse-bitmask", False, PARTS)
BITMASKS = {one.name: one for one in (TWO_OF_FOUR_BITMASK, ANY_BITMASK)}


def _layout(source: QuantisedFolder) -> Bitmask | None:
    sparse: Any = source.settings.get("sparsity_config")
    name = sparse.get("format") if isinstance(sparse, dict) else None
    return BITMASKS.get(str(name).replace("_", "-"))


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings name one of the two, and nothing is quantised besides."""
    return _layout(source) is not None and not source.settings.get("config_groups")


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format by its name, and every packed tensor. Raises BadCheckpoint."""
    layout, checkpoint = _layout(source), source.checkpoint
    assert layout is not None
    tensors: Decoded = {}
    for base, name in dense_names(checkpoint, layout).items():
        parts = [f"{base}.{part}" for part in layout.parts]
        size = sum(checkpoint.places[part].bytes for part in parts)
        read = partial(unpacked, checkpoint, base, layout)
        shape = _sizes(checkpoint, base, layout)
        dense = DenseTensor(name, shape, read, layout.name, size)
        tensors |= {parts[0]: dense, **dict.fromkeys(parts[1:])}
    return layout.name, tensors


def row_offsets(kept: Tensor) -> Tensor:
    """How many are kept in all rows before each: int64 [out], and one zero for a vector."""
    counts = kept.sum(-1)
    return counts.cumsum(0) - counts


def dense_names(checkpoint: Checkpoint, layout: Bitmask) -> dict[str, str]:
    """Dense names of everything packed. Raises BadCheckpoint unless all parts are there, once."""
    parts_of: dict[str, set[str]] = {}
    for name in checkpoint.places:
        base, _, part = name.rpartition(".")
        if part in PARTS:
            parts_of.setdefault(base, set()).add(part)
    whole = any(base.endswith(".weight") for base in parts_of)  # as until 0.8
    names = {base: base if whole else f"{base}.weight" for base in parts_of}
    for base, parts in parts_of.items():
        if parts != set(layout.parts):
            raise BadCheckpoint(
                f"{base} is stored as {', '.join(sorted(parts))}; "
                f"{', '.join(sorted(layout.parts))} were wanted. "
                "A shard may be missing; fetch the folder again."
            )
        if names[base] in checkpoint.places:
            raise BadCheckpoint(
                f"{names[base]} is stored both dense and packed; one of them was wanted."
            )
    return names


def unpacked(checkpoint: Checkpoint, base: str, layout: Bitmask) -> Tensor:
    """A dense tensor. Its memory is bounded by the stored bitmask, not by what `shape` claims."""
    sizes = _sizes(checkpoint, base, layout)
    rows, columns = sizes[:-1], sizes[-1]
    _check_place(checkpoint, f"{base}.bitmask", ("U8",), (*rows, -(-columns // 8)))
    count = checkpoint.places[f"{base}.compressed"].shape[:1]  # whether right, the bitmask tells
    stored = (*rows, columns // 2) if layout.halves else count
    _check_place(checkpoint, f"{base}.compressed", tuple(FLOATS), stored)
    if not layout.halves:
        _check_place(checkpoint, f"{base}.row_offsets", ("I64",), rows)
    bits = np.unpackbits(checkpoint.tensor(f"{base}.bitmask").numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(bits[..., :columns]).bool()  # [*rows, columns]
    values = checkpoint.tensor(f"{base}.compressed").flatten()
    marked, given, beyond = int(kept.sum()), values.numel(), bits[..., columns:].any()
    _require(not beyond, f"{base}.bitmask", f"marks inputs past the last of {columns}")
    _require(marked == given, f"{base}.bitmask", f"marks {marked} weights where {given} are stored")
    if layout.halves:
        twos = bool((kept.reshape(-1, 4).sum(-1) == 2).all())
        _require(twos, f"{base}.bitmask", "does not mark two of every four inputs")
    else:
        same = torch.equal(checkpoint.tensor(f"{base}.row_offsets"), row_offsets(kept))
        _require(same, f"{base}.row_offsets", "does not fit the bitmask")
    return torch.zeros(sizes, dtype=values.dtype).masked_scatter_(kept, values)


def _sizes(checkpoint: Checkpoint, base: str, layout: Bitmask) -> tuple[int, ...]:
    """The dense shape that is claimed: [out, in], or [in] for a vector in sparse-bitmask."""
    name = f"{base}.shape"
    place = checkpoint.places[name]
    allowed = ((2, 1), (2,)) if layout.halves else ((2,), (1,))
    listed = place.dtype == "I64" and place.shape in allowed
    _require(listed, name, "is no list of one or two sizes")
    sizes = tuple(checkpoint.tensor(name).flatten().tolist())
    _require(min(sizes) > 0, name, f"claims the sizes {sizes}")
    if layout.halves:  # a group may reach over the end of a row
        fours = sizes[1] % 2 == 0 and sizes[0] * sizes[1] % 4 == 0
        _require(fours, name, f"claims {sizes}, which hold no groups of four")
    return sizes


def _check_place(
    checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    place = checkpoint.places[name]
    stored = f"{place.dtype} {list(place.shape)}"
    sound = place.dtype in dtypes and place.shape == shape
    _require(sound, name, f"is stored as {stored}, not as {' or '.join(dtypes)} {list(shape)}")


def _require(sound: bool, tensor: str, trouble: str) -> None:
    if not sound:
        raise BadCheckpoint(f"{tensor} {trouble}. The file was cut or altered; fetch it again.")
