"""Files on a disk: what is refused of those that somebody else made, and how ours are written.

A folder may hold pipes, which block whoever opens them, and files with terabytes of nothing. So
folders are looked over once (`refuse_odd_files`) before anything in them is opened.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import BadCheckpoint, DiskFull, OutputRefused, in_one_line

MOST_BYTES = 2**28
"""Of a file that is read as a whole; the largest tokenizers have 2^25."""
READ_WHOLE = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")


def reserve(descriptor: int, offset: int, size: int) -> None:
    """Reserve room on the disk for bytes of an open file: a mapped hole on a full disk is a crash.

    Raises OSError where there is none.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)
    else:
        os.truncate(descriptor, offset + size)


def refuse_odd_files(folder: Path) -> None:
    """Raise BadCheckpoint for pipes, devices, sockets, links to such, and texts of absurd sizes.

    Libraries open what they find by its name, wait for a pipe forever, and read a text as a whole.
    Folders inside are looked over as well, since chat templates may lie there, but not those inside
    them.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        try:
            status = path.stat()
        except OSError:
            continue  # a dangling link, a loop: nobody can open it
        plain = stat.S_ISREG(status.st_mode)
        if not plain and not stat.S_ISDIR(status.st_mode):
            raise BadCheckpoint(
                f"{path} is a pipe, a device or a socket; only plain files were wanted. Delete it."
            )
        if plain and path.name.endswith(READ_WHOLE) and status.st_size > MOST_BYTES:
            raise BadCheckpoint(
                f"{path} has {status.st_size:,} bytes, too many for a {path.suffix} file. "
                "Fetch it again."
            )


def identity(file: Path) -> tuple[int, ...]:
    """What differs once a file was written to or replaced, even where its old time was put back on
    it: the system's own time of the last change cannot be set.
    """
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def file_sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """While open, an OSError becomes DiskFull where there is no room, else OutputRefused."""
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
