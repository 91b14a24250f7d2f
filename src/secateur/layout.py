"""Shards with other shapes: the headers of a smaller checkpoint, and the bytes that stay as they are.

A result that only changes numbers keeps its source's shards byte for byte but for those numbers (`checkpoint`). Where
tensors become smaller, or go, each shard gets a new header before anything is computed, so that finished blocks can
be written to their places as before and memory never holds more than one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint import INDEX, Checkpoint, Place
from secateur.errors import UnsupportedModel
from secateur.model import checkpoint_tensors
from secateur.replay import LanguageModel

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""By the name of every tensor of a smaller checkpoint: the tensor of the source that it comes from, and its shape."""


CHUNK = 2**24


def size_of(source: Checkpoint, tensors: Tensors) -> int:
    """The bytes of the tensors of a smaller checkpoint."""
    return sum(_bytes(source.places[origin], shape) for origin, shape in tensors.values())


def _bytes(old: Place, shape: tuple[int, ...]) -> int:
    return old.bytes // max(prod(old.shape), 1) * prod(shape)


def resized(source: Checkpoint, folder: Path, tensors: Tensors, *, again: bool = False) -> Mapping[str, Place]:
    """Write the shards of a smaller checkpoint to `folder`, unless they are there `again`; the places of its tensors.

    A tensor lies in the shard that its origin lies in, in the same order. What has kept its shape is copied byte for
    byte, everything else is left to be written. A shard that has no tensor left is gone.
    """
    places: dict[str, Place] = {}
    for shard in source.shards:
        inside = [name for name, (origin, _) in tensors.items() if source.places[origin].shard == shard]
        if inside:
            inside.sort(key=lambda name: (source.places[tensors[name][0]].offset, name))
            text, held = _header(source, shard, inside, tensors)
            places |= held
            if not again:
                _lay_out(source, folder / shard, text, held, tensors)
    if not again and (folder / INDEX).exists():
        total = sum(place.bytes for place in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: p.shard for n, p in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _header(source: Checkpoint, shard: str, names: list[str], tensors: Tensors) -> tuple[bytes, dict[str, Place]]:
    """The header of a shard, with the length in front, and the places of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        origin, shape = tensors[name]
        old = source.places[origin]
        size = _bytes(old, shape)
        header[name] = {"dtype": old.dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {}
    for name in names:
        origin, shape = tensors[name]
        first, last = header[name]["data_offsets"]
        places[name] = Place(shard, 8 + len(text) + first, last - first, shape, source.places[origin].dtype)
    return len(text).to_bytes(8, "little") + text, places


def _lay_out(source: Checkpoint, file: Path, header: bytes, places: Mapping[str, Place], tensors: Tensors) -> None:
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


def check_source(source: Checkpoint, language_model: LanguageModel, names: Iterable[str]) -> None:
    """Raise UnsupportedModel unless the tensors, by their name in the model, are the bytes that the source holds.

    transformers turns some into others when it loads them; turned back, they must be what they were.
    """
    loaded = {name: _tensor(language_model.model, name) for name in names}
    for name, tensor in checkpoint_tensors(language_model, loaded, source.places).items():
        held = source.tensor(name)
        if held.dtype != tensor.dtype or not torch.equal(held, tensor):
            raise UnsupportedModel(f"{name} in {source.folder} is not what the model was loaded with.")


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).data


class Names:
    """Which tensors the smaller checkpoint has, by the names that the source has, or would have, for them."""

    def __init__(
        self, source: Checkpoint, language_model: LanguageModel, smaller: LanguageModel, kept: Sequence[int]
    ) -> None:
        self.source, self.dense, self.smaller, self.kept = source, language_model, smaller, kept
        state = {f"{language_model.block_name(0)}.{n}": t for n, t in language_model.blocks[0].named_parameters()}
        first = next(iter(checkpoint_tensors(language_model, state, source.places)))
        self.stem = f"{first.partition('.0.')[0]}."  # what the source writes before the number of a block

    def of_block(self, position: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block of the smaller model, by checkpoint name."""
        return self._stored(self.smaller, position, self.kept[position], state)

    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor of the smaller checkpoint the source's tensor that it comes from, and its own shape."""
        inside: set[str] = set()
        for index, block in enumerate(self.dense.blocks):
            inside |= self._stored(self.dense, index, index, block.state_dict()).keys()
        found = {
            name: (name, place.shape)
            for name, place in self.source.places.items()
            if name not in inside and not name.startswith(self.stem)
        }
        for position, block in enumerate(self.smaller.blocks):
            old = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{self.kept[position]}.")
            for name, tensor in self.of_block(position, block.state_dict()).items():
                found[name] = old.name(name), tuple(tensor.shape)
        return found

    def _stored(
        self, model: LanguageModel, position: int, index: int, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        start = model.block_name(position)
        buffers = {f"{start}.{name}" for name, _ in model.blocks[position].named_buffers()}
        tensors = {f"{start}.{name}": tensor for name, tensor in state.items()}
        known = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{index}.")
        return checkpoint_tensors(model, tensors, known, buffers)


@dataclass(frozen=True)
class _Old:
    """The names of a block's tensors where the block has moved; the source has those that are in it."""

    source: Checkpoint
    now: str
    before: str

    def name(self, name: str) -> str:
        return self.before + name.removeprefix(self.now) if name.startswith(self.now) else name

    def __contains__(self, name: object) -> bool:
        return self.name(str(name)) in self.source.places
