"""Checkpoint folders on disk: what is read is checked first, what is written gets its name last.

A result is the source folder again, shard for shard: each shard is copied and the bytes of the pruned tensors
are overwritten in place, which their unchanged shape and dtype allow. So headers, tensor order, sharding and
every tensor that was not pruned stay byte for byte as they were, and memory never holds more than a block.

`Output` works in a hidden folder beside the result, syncs it to disk and renames it at the end; until then
nothing has the final name, and a failed run leaves nothing behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur import demo
from secateur.errors import BadCheckpoint, DiskFull, OutputRefused, UnsupportedModel, in_one_line
from secateur.files import read_json, refuse_links_out, refuse_odd_files

MOST_NAME = 1000
"""Characters in the name of a tensor. Real ones have less than 200."""
SINGLE, INDEX, RECORD = "model.safetensors", "model.safetensors.index.json", "pruning.json"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPES = FLOATS | {
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
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
    places: Mapping[str, Place]

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
        """One tensor, mapped from its shard. Raises UnsupportedModel for a dtype that torch does not have."""
        place = self.places[name]
        if place.dtype not in _DTYPES:
            raise UnsupportedModel(f"{name} in {self.folder} is stored as {place.dtype}, which cannot be read here.")
        if not place.bytes:
            return torch.empty(place.shape, dtype=_DTYPES[place.dtype])
        held = np.memmap(self.folder / place.shard, np.uint8, "c", place.offset, (place.bytes,))
        return torch.from_numpy(held).view(_DTYPES[place.dtype]).view(place.shape)


def resolve(model: str | Path | None) -> Path:
    """The folder of a model: the embedded demo for None, a folder as it is, else a download from the hub.

    Raises BadCheckpoint where it is none of these.
    """
    if model is None:
        return demo.model_folder()
    folder = Path(model)
    if folder.is_dir():
        refuse_odd_files(folder)
        return folder
    if folder.exists():
        raise BadCheckpoint(f"{model} is a file; the folder of a checkpoint was wanted.")
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise BadCheckpoint(f"There is no checkpoint folder {model}.")
    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{model} is neither a folder here nor a model that the hub gives out: {in_one_line(error)}."
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every header checked against its file. Raises BadCheckpoint."""
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder} is no checkpoint folder: it has no config.json.")
    _json_object(folder / "config.json")
    indexed = _index(folder)
    shards = tuple(sorted(set(indexed.values()))) if indexed else _single_shard(folder)
    places: dict[str, Place] = {}
    for shard in shards:
        for name, place in _read_header(folder / shard):
            if name in places:
                raise BadCheckpoint(f"{name} is in two shards of {folder}: {places[name].shard} and {shard}.")
            places[name] = place
    for name, shard in indexed.items():
        if name not in places or places[name].shard != shard:
            raise BadCheckpoint(f"The index of {folder} says that {name} is in {shard}, which does not hold it.")
    return Checkpoint(folder, shards, places)


def _index(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the index says; empty where there is no index."""
    file = folder / INDEX
    if not file.is_file():
        return {}
    weight_map = _json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{file} is no index of safetensors shards: it has no 'weight_map' of names.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{file} names {shard!r}; a .safetensors file in the same folder was wanted.")
        if not (folder / shard).is_file():
            raise BadCheckpoint(f"The index of {folder} names {shard}, which is missing. Fetch it again.")
    return weight_map


def _json_object(file: Path) -> dict[str, Any]:
    try:
        held = read_json(file)
    except ValueError as error:
        raise BadCheckpoint(f"{file} is no JSON ({in_one_line(error)}). Fetch it again.") from error
    if not isinstance(held, dict):
        raise BadCheckpoint(f"{file} holds a {type(held).__name__}; an object was wanted.")
    return held


def _single_shard(folder: Path) -> tuple[str, ...]:
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise BadCheckpoint(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded. "
            "Convert them to safetensors first: load the model in a place you trust and call save_pretrained."
        )
    if packed := sorted(f.name for f in folder.glob("packed-*.safetensors")):
        raise BadCheckpoint(
            f"{folder} is packed ({packed[0]}). Make it dense first: secateur export {folder} --to dense --out DIR."
        )
    raise BadCheckpoint(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.")


def _read_header(file: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of every tensor of a shard. The library checks that header and file size agree."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, MemoryError) as error:  # memory: a file of terabytes is mapped
        raise BadCheckpoint(
            f"{file} is no sound safetensors file ({in_one_line(error)}). It may be cut short; fetch it again."
        ) from error
    for name, entry in header.items():
        if name != "__metadata__":
            if not name.isprintable() or len(name) > MOST_NAME:
                raise BadCheckpoint(
                    f"{file} holds a tensor with the name {name[:80]!r}, which is none. Fetch it again."
                )
            start, stop = entry["data_offsets"]
            yield (
                name,
                Place(file.name, 8 + length + start, stop - start, tuple(entry["shape"]), entry["dtype"]),
            )


def file_sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"The disk filled up while {out} was written; nothing was left behind.") from error
        raise OutputRefused(f"{out} cannot be written: {in_one_line(error)}.") from error


class Output:
    """A result folder being written. Use `with output(...) as result:`; `finish` gives it its name."""

    def __init__(self, source: Checkpoint, out: Path, partial: Path, overwrite: bool) -> None:
        self.source, self.out, self.partial, self.overwrite = source, out, partial, overwrite
        self.places = source.places

    def configure(self, changes: Mapping[str, Any], model_type: str) -> None:
        """Change fields of `config.json`, in the part that describes a model of that type. Raises BadCheckpoint."""
        file = self.partial / "config.json"
        held = _json_object(file)
        parts = [
            part for part in (held, *held.values()) if isinstance(part, dict) and part.get("model_type") == model_type
        ]
        if not parts:
            raise BadCheckpoint(f"{self.source.folder / 'config.json'} has no part for a {model_type!r} model.")
        parts[0].update(changes)
        with disk_errors(self.out):
            file.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by checkpoint name; shapes as in `places`, cast to the dtype stored there.

        Raises DiskFull or OutputRefused.
        """
        with disk_errors(self.out):
            for name, tensor in tensors.items():
                place = self.places[name]
                stored = tensor.detach().cpu().to(FLOATS[place.dtype]).contiguous()
                if tuple(stored.shape) != place.shape:
                    raise AssertionError(f"{name} has shape {tuple(stored.shape)}, stored {place.shape}")
                with (self.partial / place.shard).open("r+b") as stream:
                    stream.seek(place.offset)
                    stream.write(stored.flatten().view(torch.uint8).numpy().data)

    def finish(self, record: dict[str, Any]) -> None:
        """Write `pruning.json`, sync everything to disk, and rename the folder into place."""
        with disk_errors(self.out):
            record["shards"] = {
                shard: {"source_sha256": digest, "sha256": file_sha256(self.partial / shard)}
                for shard, digest in self.source.sha256().items()
                if (self.partial / shard).exists()
            }
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
            (self.partial / RECORD).write_text(text + "\n", encoding="utf-8")
            for file in self.partial.iterdir():
                _sync(file)
            _sync(self.partial)
            self._rename()
            _sync(self.out.parent)

    def _rename(self) -> None:
        try:
            refuse_output(self.out, overwrite=self.overwrite)
        except OutputRefused as error:
            kept = Path(mkdtemp(prefix=f"{self.out.name}.", dir=self.out.parent))
            self.partial.rename(kept)
            raise OutputRefused(f"{error} That came about during the run, so the result is in {kept}.") from error
        if not self.out.exists():
            self.partial.rename(self.out)
            return
        aside = self.partial.with_name(f".{self.out.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        self.out.rename(aside)
        try:
            self.partial.rename(self.out)
        except OSError:
            aside.rename(self.out)
            raise
        shutil.rmtree(aside)


@contextmanager
def output(source: Checkpoint, out: Path, *, overwrite: bool, other_weights: int | None = None) -> Iterator[Output]:
    """A result folder beside `out`, holding a copy of the source; removed again unless it is finished.

    With `other_weights` the shards are left to whoever makes others of so many bytes (`layout.resized`). Raises
    OutputRefused where `out` holds something already, DiskFull where the result cannot fit.
    """
    out, model = out.resolve(), source.folder.resolve()  # a link is followed, so that the result lies where it points
    if out == model:
        raise OutputRefused(f"{out} is the model itself. Choose another folder.")
    if model in out.parents or out in model.parents:
        raise OutputRefused(
            f"One of {out} and the model's folder {model} lies inside the other. Choose another folder."
        )
    refuse_output(out, overwrite=overwrite)
    refuse_links_out(model)
    partial = out.with_name(f".{out.name}.partial")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            copied = [
                file
                for file in sorted(source.folder.iterdir())
                if file.is_file() and file.name not in (RECORD, *source.shards)
                and not file.name.endswith(_OTHER_WEIGHTS)
            ]  # fmt: skip
            free = shutil.disk_usage(out.parent).free
            size = source.bytes if other_weights is None else other_weights
            if free < (size := size + sum(file.stat().st_size for file in copied)):
                raise DiskFull(f"{out} needs {_size(size)}, the disk has {_size(free)} free.")
            partial.mkdir()
            for file in [*copied, *(source.folder / shard for shard in source.shards if other_weights is None)]:
                shutil.copyfile(file, partial / file.name)
        yield Output(source, out, partial, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # what is not empty stays
            for folder in made:
                folder.rmdir()


def refuse_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputRefused where `out` holds something that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise OutputRefused(f"{out} is a file; a folder was wanted.")
    if out.resolve() == Path.cwd():
        raise OutputRefused(f"{out} is the current folder. Name a folder inside it.")
    if out.is_mount():
        raise OutputRefused(f"{out} is a mount point, which cannot be replaced at once. Name a folder inside it.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputRefused(f"{out} exists already. Choose another --out, or replace it with --overwrite.")
        if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
            raise OutputRefused(f"{out} is no checkpoint folder, so --overwrite does not replace it.")
        if folders := sorted(path.name for path in out.iterdir() if path.is_dir()):
            raise OutputRefused(
                f"{out} holds other folders ({folders[0]}), so --overwrite does not replace it. Delete it yourself."
            )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
