"""Shards with other shapes: the headers of a smaller checkpoint, and the bytes that stay as they
are.

A result that only changes numbers keeps its source's shards byte for byte but for those numbers
(`result`). Where tensors become smaller, or go, each shard gets a new header before anything is
computed, so that finished blocks can be written to their places as before and memory never holds
more than one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from secateur.checkpoints.folder import INDEX, Checkpoint, TensorLocation
from secateur.system.json_files import write_json

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""By the name of every tensor of a smaller checkpoint: the tensor of the source that it comes from,
and its shape.
"""

CHUNK = 2**24


def size_of(source: Checkpoint, tensors: Tensors) -> int:
    """The bytes of the tensors of a smaller checkpoint."""
    return sum(_bytes(source.places[origin], shape) for origin, shape in tensors.values())


def _bytes(old: TensorLocation, shape: tuple[int, ...]) -> int:
    return old.bytes // max(prod(old.shape), 1) * prod(shape)


def resized(
    source: Checkpoint, folder: Path, tensors: Tensors, *, again: bool = False
) -> Mapping[str, TensorLocation]:
    """Write the shards of a smaller checkpoint to `folder`, unless they are there `again`; the
    places of its tensors.

    A tensor lies in the shard that its origin lies in, in the same order. What has kept its shape
    is copied byte for byte, everything else is left to be written. A shard that has no tensor left
    is gone.
    """
    places: dict[str, TensorLocation] = {}
    for shard in source.shards:
        inside = [
            name for name, (origin, _) in tensors.items() if source.places[origin].shard == shard
        ]
        if inside:
            inside.sort(key=lambda name: (source.places[tensors[name][0]].offset, name))
            text, held = _header(source, shard, inside, tensors)
            places |= held
            if not again:
                _lay_out(source, folder / shard, text, held, tensors)
    if not again and (folder / INDEX).exists():
        total = sum(place.bytes for place in places.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: p.shard for n, p in sorted(places.items())},
        }
        write_json(folder / INDEX, index, 2)
    return places


def _header(
    source: Checkpoint, shard: str, names: list[str], tensors: Tensors
) -> tuple[bytes, dict[str, TensorLocation]]:
    """The header of a shard, with the length in front, and the places of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        origin, shape = tensors[name]
        old = source.places[origin]
        size = _bytes(old, shape)
        header[name] = {
            "dtype": old.dtype,
            "shape": list(shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {}
    for name in names:
        origin, shape = tensors[name]
        first, last = header[name]["data_offsets"]
        places[name] = TensorLocation(
            shard, 8 + len(text) + first, last - first, shape, source.places[origin].dtype
        )
    return len(text).to_bytes(8, "little") + text, places


def _lay_out(
    source: Checkpoint,
    file: Path,
    header: bytes,
    places: Mapping[str, TensorLocation],
    tensors: Tensors,
) -> None:
    """Write a shard with what has kept its shape; the rest of it is zeros."""
    with file.open("wb") as stream, (source.folder / file.name).open("rb") as held:
        stream.write(header)
        stream.truncate(max(place.offset + place.bytes for place in places.values()))
        for name, place in places.items():
            old = source.places[tensors[name][0]]
            if old.shape == place.shape:
                held.seek(old.offset)
                stream.seek(place.offset)
                for start in range(0, old.bytes, CHUNK):
                    stream.write(held.read(min(CHUNK, old.bytes - start)))
