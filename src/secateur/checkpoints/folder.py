"""Checkpoint folders on disk: what is read is checked first. What is written is in result.py."""

import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.checkpoints.no_weights import INDEX, SINGLE, no_config, no_weights
from secateur.errors import BadCheckpoint, UnsupportedModel, in_one_line
from secateur.system.files import file_sha256
from secateur.system.json_files import json_object

MOST_NAME = 1000
"""Characters in the name of a tensor. Real ones have less than 200."""
RECORD = "pruning.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class TensorLocation:
    """Where the bytes of a tensor lie."""

    shard: str
    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A sound safetensors checkpoint: its folder, shards by name, and the place of every tensor."""

    folder: Path
    shards: tuple[str, ...]
    places: Mapping[str, TensorLocation]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: place.shape for name, place in self.places.items()}

    @property
    def bytes(self) -> int:
        """The size of the shards on disk."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    def sha256(self) -> dict[str, str]:
        """The digest of every shard."""
        return {shard: file_sha256(self.folder / shard) for shard in self.shards}

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its shard. Raises UnsupportedModel for a dtype that torch does
        not have.
        """
        return self._mapped(name, self.places[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, the only ones that are mapped."""
        place = self.places[name]
        each = place.bytes // place.shape[0]
        offset, shape = place.offset + start * each, (stop - start, *place.shape[1:])
        return self._mapped(
            name, replace(place, offset=offset, bytes=(stop - start) * each, shape=shape)
        )

    def _mapped(self, name: str, place: TensorLocation) -> Tensor:
        if place.dtype not in DTYPES:
            raise UnsupportedModel(
                f"{name} in {self.folder} is stored as {place.dtype}, which cannot be read here."
            )
        if not place.bytes:
            return torch.empty(place.shape, dtype=DTYPES[place.dtype])
        mapped = np.memmap(self.folder / place.shard, np.uint8, "c", place.offset, (place.bytes,))
        return torch.from_numpy(mapped).view(DTYPES[place.dtype]).view(place.shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every header checked against its file. Raises BadCheckpoint."""
    if not (folder / "config.json").is_file():
        raise no_config(str(folder), (file.name for file in folder.iterdir()))
    json_object(folder / "config.json")
    indexed = _index(folder)
    shards = tuple(sorted(set(indexed.values()))) if indexed else _single_shard(folder)
    places: dict[str, TensorLocation] = {}
    for shard in shards:
        for name, place in _read_header(folder / shard):
            if name in places:
                raise BadCheckpoint(
                    f"{name} is in two shards of {folder}: {places[name].shard} and {shard}."
                )
            places[name] = place
    for name, shard in indexed.items():
        if name not in places or places[name].shard != shard:
            raise BadCheckpoint(
                f"The index of {folder} says that {name} is in {shard}, which does not hold it."
            )
    return Checkpoint(folder, shards, places)


def is_whole(folder: Path) -> bool:
    """Whether the weights lie in the folder, and not the configuration alone. Raises BadCheckpoint
    for a bad index.
    """
    shards = set(_weight_map(folder).values()) or {weight_file(folder)}
    return all((folder / shard).is_file() for shard in shards)


def weight_file(folder: Path, files: Container[str] | None = None) -> str:
    """The file from which transformers loads the weights of a folder, shards or their index: what
    config.json names, else `model.safetensors`, else the index.

    `files`: the names in the repository that the folder comes from; None for what lies there.
    """
    named = json_object(folder / "config.json").get("transformers_weights")
    if named is None:
        there = {name for name in (SINGLE, INDEX) if _has(folder, name, files)}
        return SINGLE if SINGLE in there or INDEX not in there else INDEX
    if not isinstance(named, str) or Path(named).name != named:
        raise BadCheckpoint(
            f"{folder / 'config.json'} names {named!r} as transformers_weights; a file in the same "
            "folder was wanted."
        )
    return named


def _has(folder: Path, name: str, files: Container[str] | None) -> bool:
    return (folder / name).is_file() if files is None else name in files


def wanted_shards(folder: Path, files: Container[str]) -> list[str]:
    """The files that the weights lie in, of a repository with these files, whose config.json and
    index are in the folder. Raises BadCheckpoint for a bad index.
    """
    return sorted(set(_weight_map(folder, files).values())) or [weight_file(folder, files)]


def _weight_map(folder: Path, files: Container[str] | None = None) -> dict[str, str]:
    """The shard of every tensor, as the index says; empty where there is none, or it is not used.
    Shards may be missing.
    """
    file = folder / weight_file(folder, files)
    if not file.name.endswith(".index.json") or not file.is_file():
        return {}
    weight_map = json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(
            f"{file} is no index of safetensors shards: it has no 'weight_map' of names."
        )
    for shard in weight_map.values():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or not shard.endswith(".safetensors")
        ):
            raise BadCheckpoint(
                f"{file} names {shard!r}; a .safetensors file in the same folder was wanted."
            )
    return weight_map


def _index(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the index says; empty where there is no index."""
    weight_map = _weight_map(folder)
    for shard in weight_map.values():
        if not (folder / shard).is_file():
            raise BadCheckpoint(
                f"The index of {folder} names {shard}, which is missing. Fetch it again."
            )
    return weight_map


def _single_shard(folder: Path) -> tuple[str, ...]:
    if (folder / (single := weight_file(folder))).is_file():
        return (single,)
    raise no_weights(str(folder), (file.name for file in folder.iterdir()))


def _read_header(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    """Name and place of every tensor of a shard. The library checks that header and file size
    agree.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (
        SafetensorError,
        OSError,
        ValueError,
        MemoryError,
    ) as error:  # memory: a file of terabytes is mapped
        raise BadCheckpoint(
            f"{file} is no sound safetensors file ({in_one_line(error)}). It may be cut short; "
            "fetch it again."
        ) from error
    for name, entry in header.items():
        if name != "__metadata__":
            if not name.isprintable() or len(name) > MOST_NAME:
                raise BadCheckpoint(
                    f"{file} holds a tensor with the name {name[:80]!r}, which is none. Fetch it "
                    "again."
                )
            start, stop = entry["data_offsets"]
            yield (
                name,
                TensorLocation(
                    file.name,
                    8 + length + start,
                    stop - start,
                    tuple(entry["shape"]),
                    entry["dtype"],
                ),
            )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype in which most of a checkpoint's bytes are stored, whatever its config.json
    says.
    """
    bytes_of: Counter[str] = Counter()
    for place in checkpoint.places.values():
        if place.dtype in FLOATS:
            bytes_of[place.dtype] += place.bytes
    if not bytes_of:
        raise BadCheckpoint(f"{checkpoint.folder} holds no floating-point weights.")
    return FLOATS[bytes_of.most_common(1)[0][0]]
