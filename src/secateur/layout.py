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

Shapes = Mapping[str, tuple[int, ...]]


def resized(source: Checkpoint, folder: Path, shapes: Shapes) -> Mapping[str, Place]:
    """Write the shards of a smaller checkpoint to `folder`; the places of its tensors, `shapes` by checkpoint name.

    Tensors of unchanged shape are copied, the others are left to be written. A shard that has no tensor left is gone.
    """
    places: dict[str, Place] = {}
    for shard in source.shards:
        inside = [name for name, place in source.places.items() if place.shard == shard and name in shapes]
        if inside:
            places |= _shard(source, folder / shard, sorted(inside, key=lambda n: source.places[n].offset), shapes)
    if (folder / INDEX).exists():
        total = sum(place.bytes for place in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: p.shard for n, p in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _shard(source: Checkpoint, file: Path, names: list[str], shapes: Shapes) -> dict[str, Place]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes, start = {}, 0
    for name in names:
        old = source.places[name]
        sizes[name] = old.bytes // max(prod(old.shape), 1) * prod(shapes[name])
        header[name] = {"dtype": old.dtype, "shape": list(shapes[name]), "data_offsets": [start, start + sizes[name]]}
        start += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {}
    with file.open("wb") as stream, (source.folder / file.name).open("rb") as held:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)
        for name in names:
            old = source.places[name]
            offset = 8 + len(text) + header[name]["data_offsets"][0]
            places[name] = replace(old, offset=offset, bytes=sizes[name], shape=tuple(shapes[name]))
            if old.shape == places[name].shape:
                held.seek(old.offset)
                stream.seek(offset)
                stream.write(held.read(old.bytes))
    return places
