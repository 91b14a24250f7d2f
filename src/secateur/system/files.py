"""Files that somebody else made: what they are is looked at before anything opens them, and JSON
comes as it may.

A folder may hold pipes, which block whoever opens them, and files with terabytes of nothing; JSON
may be nested until whoever walks it fails, hold text that cannot be printed, and numbers that no
JSON has. So folders are looked over once (`refuse_odd_files`), everything of ours is read by
`read_json`, and `fits` says whether a value has a type.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import BadCheckpoint, DiskFull, OutputRefused, in_one_line

MOST_BYTES, MOST_DEPTH = 2**28, 64
"""Of a file that is read as a whole, and of the objects and lists in a JSON file. The largest
tokenizers have 2^25.
"""
READ_WHOLE = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")


def reserve(descriptor: int, offset: int, size: int) -> None:
    """Make room for bytes of an open file on the disk, where the system can: a mapped hole on a
    full one is a crash.

    Raises OSError where there is none.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)
    else:
        os.truncate(descriptor, offset + size)


def refuse_odd_files(folder: Path) -> None:
    """Raise BadCheckpoint for pipes, devices and sockets in a folder, links to such, and texts of
    absurd sizes.

    Libraries open what they find by its name, wait for a pipe forever, and read a text as a whole.
    Folders inside are looked over as well, since chat templates may lie there, but not those inside
    them.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        try:
            held = path.stat()
        except OSError:
            continue  # a dangling link, a loop: nobody can open it
        if not stat.S_ISREG(held.st_mode) and not stat.S_ISDIR(held.st_mode):
            raise BadCheckpoint(
                f"{path} is a pipe, a device or a socket; only plain files were wanted. Delete it."
            )
        if (
            path.name.endswith(READ_WHOLE)
            and stat.S_ISREG(held.st_mode)
            and held.st_size > MOST_BYTES
        ):
            raise BadCheckpoint(
                f"{path} has {held.st_size:,} bytes, too many for a {path.suffix} file. Fetch it again."
            )


def refuse_links_out(folder: Path) -> None:
    """Raise BadCheckpoint for links to files outside of a folder whose files are about to be
    copied, shards excepted.

    A link in a folder from elsewhere can name a private key; the copy would then be in a result
    that is given away. The hub's own cache keeps its files in a folder beside the snapshots.
    """
    inside = folder.resolve()
    own = (
        (inside, inside.parent.parent / "blobs") if inside.parent.name == "snapshots" else (inside,)
    )
    for path in folder.iterdir():
        if path.is_symlink() and path.is_file() and path.suffix != ".safetensors":
            target = path.resolve()
            if not any(place in target.parents for place in own):
                raise BadCheckpoint(
                    f"{path} is a link to {target}, outside of the folder. Put a copy in its place."
                )


def read_json(file: Path, *, finite: bool = False) -> Any:
    """The value in a JSON file. `finite`: NaN and Infinity, which are no JSON but which Python
    writes, are refused.

    Raises ValueError for what is no JSON, not UTF-8, nested deeper than `MOST_DEPTH`, too large, no
    plain file, or has text that cannot be encoded again; OSError where it cannot be opened.
    """
    held = file.stat()
    if not stat.S_ISREG(held.st_mode):
        raise ValueError("it is no plain file")
    if held.st_size > MOST_BYTES:
        raise ValueError(f"it has {held.st_size:,} bytes")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    for part, depth in _parts(value):
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH}")
        if isinstance(part, str):
            part.encode()  # a lone half of a surrogate pair is a UnicodeEncodeError, which is a ValueError
        elif finite and isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"it holds {part}")
    return value


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """Everything in a JSON value, keys as well, with how deep it lies; without recursion."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        yield part, depth
        if isinstance(part, dict):
            waiting += [(inside, depth + 1) for pair in part.items() for inside in pair]
        elif isinstance(part, list):
            waiting += [(inside, depth + 1) for inside in part]


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type as annotations say it: `list[str]`, `tuple[float, float]`,
    `int | None` …

    A whole number is a float too, a bool is no number, whole numbers have 64 bits, and floats are
    finite.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(fits(part, inside[0]) for part in value)
    if origin is tuple:
        pairs = (
            zip(value, inside, strict=True)
            if isinstance(value, list) and len(value) == len(inside)
            else None
        )
        return pairs is not None and all(fits(part, one) for part, one in pairs)
    if origin is dict:
        return isinstance(value, dict) and all(fits(part, inside[1]) for part in value.values())
    if hint is int or (hint is float and type(value) is int):
        return type(value) is int and abs(value) < 2**63
    return type(value) is hint and (hint is not float or math.isfinite(value))


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, an object. Raises BadCheckpoint."""
    try:
        held = read_json(file)
    except ValueError as error:
        raise BadCheckpoint(f"{file} is no JSON ({in_one_line(error)}). Fetch it again.") from error
    if not isinstance(held, dict):
        raise BadCheckpoint(f"{file} holds a {type(held).__name__}; an object was wanted.")
    return held


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
            raise DiskFull(f"The disk filled up while {out} was written.") from error
        raise OutputRefused(f"{out} cannot be written: {in_one_line(error)}.") from error


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Write beside and rename, so that a file is whole or absent."""
    part = file.with_name(f".{file.name}.partial")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
