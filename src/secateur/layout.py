"""Shards with other shapes: the headers of a smaller checkpoint, and the bytes that stay as they are.

A result that only changes numbers keeps its source's shards byte for byte but for those numbers (`checkpoint`). Where
tensors become smaller, or go, each shard gets a new header before anything is computed, so that finished blocks can
be written to their places as before and memory never holds more than one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from secateur.checkpoint import INDEX, Checkpoint, Place

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""By the name of every tensor of a smaller checkpoint: the tensor of the source that it comes from, and its shape."""


def resized(source: Checkpoint, folder: Path, tensors: Tensors) -> Mapping[str, Place]:
    """Write the shards of a smaller checkpoint to `folder`; returns the places of its tensors.

    A tensor lies in the shard that its origin lies in, in the same order. What has kept its name and its shape is
    copied, everything else is left to be written. A shard that has no tensor left is gone.
    """
    places: dict[str, Place] = {}
    for shard in source.shards:
        inside = [name for name, (origin, _) in tensors.items() if source.places[origin].shard == shard]
        if inside:
            inside.sort(key=lambda name: (source.places[tensors[name][0]].offset, name))
            places |= _shard(source, folder / shard, inside, tensors)
    if (folder / INDEX).exists():
        total = sum(place.bytes for place in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: p.shard for n, p in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _shard(source: Checkpoint, file: Path, names: list[str], tensors: Tensors) -> dict[str, Place]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        origin, shape = tensors[name]
        old = source.places[origin]
        size = old.bytes // max(prod(old.shape), 1) * prod(shape)
        header[name] = {"dtype": old.dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {}
    with file.open("wb") as stream, (source.folder / file.name).open("rb") as held:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)
        for name in names:
            origin, shape = tensors[name]
            old, (first, last) = source.places[origin], header[name]["data_offsets"]
            place = replace(old, offset=8 + len(text) + first, bytes=last - first, shape=shape)
            places[name] = place
            if origin == name and old.shape == shape:
                held.seek(old.offset)
                stream.seek(place.offset)
                stream.write(held.read(old.bytes))
    return places
