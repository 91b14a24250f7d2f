"""Writing safetensors shards: their headers, their index, and checkpoints with other shapes.

A result that only changes numbers keeps its source's shards byte for byte but for those numbers
(`result`). Where tensors become smaller, or go, each shard gets a new header before anything is
computed, so that finished blocks can be written to their places as before and memory never holds
more than one.
"""

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur.checkpoints.folder import DTYPES, INDEX, SINGLE, Checkpoint, TensorLocation
from secateur.errors import DiskFull, OutputRefused, in_one_line
from secateur.system.json_files import write_json

Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape]]
"""By a tensor's name in a smaller checkpoint: the source's tensor behind it, and its shape."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What safetensors calls a dtype."""
CHUNK = 2**24
SHARD_BYTES = 5 * 10**9


def header(
    shard: str, tensors: Mapping[str, tuple[str, Shape]]
) -> tuple[bytes, dict[str, TensorLocation]]:
    """The first bytes of a safetensors file, and where its tensors then lie.

    `tensors` gives dtype (as safetensors says it, "BF16") and shape by name; they follow one
    another in this order. The bytes are the length of the header and the header, padded so that the
    tensors begin at a multiple of eight.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stops = [0]
    for name, (dtype, shape) in tensors.items():
        stops.append(stops[-1] + DTYPES[dtype].itemsize * prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": stops[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places, begin = {}, 8 + len(text)
    for (name, (dtype, shape)), start, stop in zip(tensors.items(), stops, stops[1:], strict=False):
        places[name] = TensorLocation(shard, begin + start, stop - start, shape, dtype)
    return len(text).to_bytes(8, "little") + text, places


class ShardWriter:
    """Writes a shard whose tensors come one after the other, of sizes that nobody knows before.

    Room for the header is left in front of them: `names` are those that may come, `metadata` the
    longest that there may be. Their bytes begin at multiples of eight as long as those of all
    before are multiples of eight.
    """

    ENTRY = 400
    """Bytes of the header for a tensor, at most, beside its name."""

    def __init__(self, file: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        room = sum(len(json.dumps(name)) + self.ENTRY for name in names)
        room += len(json.dumps(metadata)) + self.ENTRY
        self.room, self.entries = room + -room % 8, dict[str, object]()
        self.stream, self.stop = file.open("wb"), 0
        self.stream.seek(8 + self.room)

    def add(self, name: str, shape: Sequence[int], parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes in `parts`, one after the other."""
        start, dtype = self.stop, None
        for part in parts:
            dtype = NAMES[part.dtype]
            self.stop += self.stream.write(bytes_of(part))
        assert dtype is not None
        offsets = [start, self.stop]
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and close the file."""
        entries = {"__metadata__": dict(metadata), **self.entries}
        text = json.dumps(entries, separators=(",", ":")).encode()
        assert len(text) <= self.room
        self.stream.seek(0)
        self.stream.write(self.room.to_bytes(8, "little") + text.ljust(self.room))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def write_index(folder: Path, shard_of: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint: the shard of every tensor, and the bytes of all."""
    index = {"metadata": {"total_size": total_size}, "weight_map": shard_of}
    write_json(folder / INDEX, index, 2)


def save(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a shard, with the permissions of config.json. Raises DiskFull, OutputRefused."""
    try:
        save_file(tensors, file, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:  # which tells errors of the disk in words alone
        kind = DiskFull if f"os error {errno.ENOSPC}" in str(error) else OutputRefused
        raise kind(f"{file} cannot be written: {in_one_line(error)}.") from error
    # safetensors lets only the owner read its files
    file.chmod((file.parent / "config.json").stat().st_mode)


def save_in_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, most: int = SHARD_BYTES
) -> None:
    """Write tensors as a checkpoint, in shards of at most `most` bytes or a single tensor.

    A shard is in memory at a time. One alone is `model.safetensors`; several have an index.
    """
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def finish() -> None:
        save(shard, folder / f"part-{len(names)}.safetensors")
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > most:
            finish()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    finish()
    shard_of: dict[str, str] = {}
    for index, inside in enumerate(names):
        several = f"model-{index + 1:05d}-of-{len(names):05d}.safetensors"
        file = several if len(names) > 1 else SINGLE
        (folder / f"part-{index}.safetensors").rename(folder / file)
        shard_of |= dict.fromkeys(inside, file)
    if len(names) > 1:
        write_index(folder, shard_of, total)


def size_of(source: Checkpoint, tensors: Tensors) -> int:
    """The bytes of the tensors of a smaller checkpoint."""
    return sum(
        DTYPES[source.places[origin].dtype].itemsize * prod(shape)
        for origin, shape in tensors.values()
    )


def resized(
    source: Checkpoint, folder: Path, tensors: Tensors, *, again: bool = False
) -> Mapping[str, TensorLocation]:
    """Write the shards of a smaller checkpoint, unless they are there `again`; gives its places.

    A tensor lies in the shard that its origin lies in, in the same order. What has kept its shape
    is copied byte for byte, everything else is left to be written. A shard that has no tensor left
    is gone.
    """
    places: dict[str, TensorLocation] = {}
    origins = {name: source.places[origin] for name, (origin, _) in tensors.items()}
    for shard in source.shards:
        names = sorted(
            (name for name, old in origins.items() if old.shard == shard),
            key=lambda name: (origins[name].offset, name),
        )
        if names:
            first, inside = header(shard, {n: (origins[n].dtype, tensors[n][1]) for n in names})
            places |= inside
            if not again:
                _lay_out(source.folder / shard, folder / shard, first, inside, origins)
    if not again and (folder / INDEX).exists():
        total = sum(place.bytes for place in places.values())
        write_index(folder, {name: p.shard for name, p in sorted(places.items())}, total)
    return places


def _lay_out(
    old_file: Path,
    file: Path,
    first: bytes,
    places: Mapping[str, TensorLocation],
    origins: Mapping[str, TensorLocation],
) -> None:
    """Write a shard with what has kept its shape; the rest of it is zeros."""
    with file.open("wb") as new, old_file.open("rb") as old:
        new.write(first)
        new.truncate(max(place.offset + place.bytes for place in places.values()))
        for name, place in places.items():
            if origins[name].shape == place.shape:
                old.seek(origins[name].offset)
                new.seek(place.offset)
                for start in range(0, place.bytes, CHUNK):
                    new.write(old.read(min(CHUNK, place.bytes - start)))
