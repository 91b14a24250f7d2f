"""A quantised checkpoint written as a plain one, into a cache that any run finds again.

The copy lies in `$SECATEUR_CACHE` (`~/.cache/secateur/unpacked`), under a name made of the source's
place, sizes and times, of the dtype, and of the version of what decodes it. Of the times, one is of
the last change of a file's bytes, name or rights, which nobody can set back. The copy is written
beside and renamed, so a run that is killed leaves no copy that looks whole. Memory holds one tensor
at a time: the header of a shard comes first, then each tensor to its place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import DTYPES, SINGLE
from secateur.checkpoints.quantised.base import DenseTensor, PlainSource
from secateur.checkpoints.shards import SHARD_BYTES, header, write_index
from secateur.errors import BadCheckpoint, DiskFull, UnknownName
from secateur.system.files import disk_errors, identity, sync
from secateur.system.json_files import read_json, write_json
from secateur.system.machine import versions
from secateur.system.memory import freed_memory_kept
from secateur.system.progress import Progress
from secateur.system.sizes import in_words

DECODERS = 2
"""The version of all decoders: another one when what they give changes, so copies are made anew.
Of GGUF that is settings and vocabulary too.
"""
RESULTS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What a quantised source can be unpacked to, and how safetensors calls that."""
SOURCE = "source.json"
"""The file of an unpacked folder that says what it was made from."""
FILES = "files"
"""What that file has besides: each file of the copy with its size and time of change."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def unpacked(
    source: PlainSource,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
    most: int = SHARD_BYTES,
) -> Path:
    """The folder with the plain copy of a source, which is made unless it is there.

    Matrices get the `dtype`; vectors that are stored in float32, and whole numbers, stay as they
    are. Of several processes one makes the copy and the others wait for it. Raises UnknownName for
    another dtype, DiskFull, OutputRefused, BadCheckpoint where a tensor cannot be decoded.
    """
    if dtype not in RESULTS:
        raise UnknownName("dtype of a result", dtype, RESULTS)
    folder, progress = place_of(source, dtype), progress or Progress()
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if not _as_it_was_written(folder):
                _make(source, folder, dtype, progress, most)
    return folder


def place_of(source: PlainSource, dtype: str) -> Path:
    """Where the plain copy of a source lies, whether it is there or not."""
    if source.identity:
        return _place_of_file(source.origin, source.identity, dtype)
    stamps = [[str(file), *identity(file)] for file in sorted(source.weights)]
    stamps += [
        [name, *(identity(file) if isinstance(file, Path) else ())]
        for name, file in sorted(source.files.items())
    ]
    return _place(source.origin, [stamps, source.config, dtype])


def copy_of_file(file: Path, dtype: str) -> Path | None:
    """The plain copy of a source that is a single file, which is not opened; None without one."""
    folder = _place_of_file(file, identity(file), dtype)
    return folder if _as_it_was_written(folder) else None


def _place_of_file(file: Path, stamp: tuple[int, ...], dtype: str) -> Path:
    """All that is written comes from the file, and from what libraries know of its kind."""
    return _place(file, [stamp, _versions(), dtype])


def _place(origin: Path, what: list[Any]) -> Path:
    whole = json.dumps([str(origin.resolve()), *what, DECODERS], sort_keys=True)
    key = sha256(whole.encode()).hexdigest()[:16]
    return cache_folder() / f"{origin.resolve().stem}-{key}"


def cache_folder() -> Path:
    """Where plain copies of quantised checkpoints lie: `SECATEUR_CACHE`, or a folder at home."""
    named = os.environ.get("SECATEUR_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "secateur" / "unpacked"


def source_of(folder: Path) -> dict[str, Any] | None:
    """What an unpacked folder was made from, {"format", "folder", …}; None for any other folder."""
    file = folder / SOURCE
    if not file.is_file():
        return None
    try:
        value = read_json(file)
    except ValueError:
        return None  # a file of this name that somebody else put there
    known = isinstance(value, dict) and {"format", "folder", "weights"} <= value.keys()
    return {key: one for key, one in value.items() if key != FILES} if known else None


def _as_it_was_written(folder: Path) -> bool:
    """Whether the copy is there, each of its files with the size and time of change that it had."""
    try:
        return all(
            list(_stamp(folder / name)) == stamp
            for name, stamp in read_json(folder / SOURCE)[FILES].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # the record is missing or spoilt, or a file is gone


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _versions() -> dict[str, str]:
    with suppress(PackageNotFoundError):
        return {**versions(), "gguf": version("gguf")}
    return versions()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time; the others wait for it."""
    with file.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(source: PlainSource, folder: Path, dtype: str, progress: Progress, most: int) -> None:
    """Write the copy beside its place, and give it its name when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    size = sum(bytes_of(tensor, dtype) for tensor in source.tensors)
    _refuse_full(source, folder, size)
    progress.note(
        f"{source.origin} is {source.format}; it is unpacked to {folder} "
        f"({in_words(size)}, {dtype}), used again from there, and may be deleted."
    )
    try:
        partial.mkdir()
        with freed_memory_kept():  # or each piece asks the system for new pages
            write_plain(source, partial, dtype, progress, most)
        stamps = {file.name: list(_stamp(file)) for file in source.weights}
        origin = str(source.origin.resolve())
        record = {"format": source.format, "folder": origin, "weights": stamps, "dtype": dtype}
        files = [file for file in partial.rglob("*") if file.is_file()]
        copied = {file.relative_to(partial).as_posix(): _stamp(file) for file in files}
        write_json(partial / SOURCE, {**record, FILES: copied})
        _refuse_changed(source, folder, dtype)
        for file in (*partial.rglob("*"), partial):
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)  # one that is not as it was written
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_changed(source: PlainSource, folder: Path, dtype: str) -> None:
    """Raise BadCheckpoint where the source is no longer what it was when its copy was begun."""
    now = replace(source, identity=identity(source.origin)) if source.identity else source
    if place_of(now, dtype) != folder:
        raise BadCheckpoint(
            f"{source.origin} changed while it was unpacked. Let it be during a run, and begin "
            "again."
        )


def _refuse_full(source: PlainSource, folder: Path, size: int) -> None:
    """Raise DiskFull where the copy does not fit."""
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise DiskFull(
            f"{source.origin} is {source.format}; unpacked it takes {in_words(size)} in "
            f"{folder.parent}, where {in_words(free)} are free. Name another folder with the "
            "environment variable SECATEUR_CACHE."
        )


def write_plain(
    source: PlainSource, folder: Path, dtype: str, progress: Progress, most: int = SHARD_BYTES
) -> None:
    """Write a source as a plain checkpoint into an empty folder, in shards of at most `most` bytes
    or a single tensor. Raises BadCheckpoint where a tensor has another shape than was announced.
    """
    write_json(folder / "config.json", {**source.config, "dtype": dtype}, 2)
    for name, file in source.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(file, Path):
            shutil.copyfile(file, folder / name)
        else:
            file(folder / name)
    groups = _groups(source, dtype, most)
    shard_of: dict[str, str] = {}
    progress.begin(f"unpacking {source.origin}")
    for index, group in enumerate(groups, 1):
        several = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        shard = several if len(groups) > 1 else SINGLE
        for tensor in _write_shard(group, folder / shard, dtype):
            shard_of[tensor.name] = shard
            progress.advance(tensor.name, len(shard_of), len(source.tensors))
    if len(groups) > 1:
        total = sum(bytes_of(tensor, dtype) for tensor in source.tensors)
        write_index(folder, shard_of, total)


def _groups(source: PlainSource, dtype: str, most: int) -> list[list[DenseTensor]]:
    """The tensors of each shard."""
    groups: list[list[DenseTensor]] = [[]]
    size = 0
    for tensor in source.tensors:
        count = bytes_of(tensor, dtype)
        if groups[-1] and size + count > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += count
    return groups


def _write_shard(group: list[DenseTensor], file: Path, dtype: str) -> Iterator[DenseTensor]:
    """Write a shard tensor by tensor, and give each when it is written."""
    kinds = {tensor.name: (written_dtype(tensor, dtype), tensor.shape) for tensor in group}
    first, places = header(file.name, kinds)
    with file.open("wb") as stream:
        stream.write(first)
        for tensor in group:
            for piece in decoded_pieces(tensor):
                decoded = piece.to(DTYPES[places[tensor.name].dtype]).contiguous()
                stream.write(_bytes(decoded))
            yield tensor


def decoded_pieces(tensor: DenseTensor) -> Iterator[Tensor]:
    """The numbers of a tensor, in parts that follow one another in the first dimension.

    Raises BadCheckpoint where they do not make the shape that was announced.
    """
    rows = 0
    for piece in tensor.pieces() if tensor.pieces else (tensor.read(),):
        rows += piece.shape[0] if piece.ndim else 0
        if piece.shape[1:] != tensor.shape[1:] or piece.ndim != len(tensor.shape):
            raise other_shape(tensor, tuple(piece.shape))
        yield piece
    if tensor.shape and rows != tensor.shape[0]:
        raise other_shape(tensor, (rows, *tensor.shape[1:]))


def other_shape(tensor: DenseTensor, shape: tuple[int, ...]) -> BadCheckpoint:
    """What to raise where a tensor has another shape than was announced."""
    return BadCheckpoint(
        f"{tensor.name} is {list(shape)} when it is decoded, and {list(tensor.shape)} by its "
        "header. Fetch the checkpoint again."
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def bytes_of(tensor: DenseTensor, dtype: str) -> int:
    """The bytes of a tensor in the plain copy."""
    return DTYPES[written_dtype(tensor, dtype)].itemsize * prod(tensor.shape)


_AS_THEY_ARE = ("BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")


def written_dtype(tensor: DenseTensor, dtype: str) -> str:
    """The dtype of a tensor in the plain copy, as safetensors calls it.

    Whole numbers that are no packed weights, and vectors in float32 (corrections of routers), stay.
    """
    vector = tensor.stored == "F32" and len(tensor.shape) < 2
    return tensor.stored if vector or tensor.stored in _AS_THEY_ARE else RESULTS[dtype]
