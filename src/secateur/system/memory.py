"""Memory: what can still be had, what this process holds, and what it gives back."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

_C_LIBRARY = ctypes.CDLL(None)
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# The limit, what is used, how much of that is cache which can be had back; version 2, version 1.
_CGROUP_FILES = [
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


def available_bytes(device: torch.device) -> int:
    """Memory still free on a device; on the CPU, what the system and control groups allow."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # what torch keeps of freed memory
    system = _bytes_in(Path("/proc/meminfo"), "MemAvailable")
    free = [] if system is None else [system]
    for folder, names in product(_memory_groups(), _CGROUP_FILES):
        with suppress(OSError, ValueError):  # not there, not readable, or "max"
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            free.append(max(limit - used + _cached(folder, names[2]), 0))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _cached(folder: Path, name: str) -> int:
    """Of what a control group uses, the cache that can be had back; 0 where it does not say."""
    with suppress(OSError, ValueError, KeyError):
        lines = (folder / "memory.stat").read_text().splitlines()
        return int(dict(line.split()[:2] for line in lines)[name])
    return 0


def _memory_groups() -> set[Path]:
    """The folders of this process's memory control group and those around it: all may limit it."""
    groups = {_CGROUP, _CGROUP / "memory"}
    with suppress(OSError):
        for kinds, name in re.findall(r"^\d+:(.*?):/?(.*)$", _OWN_CGROUP.read_text(), re.MULTILINE):
            if not kinds or "memory" in kinds.split(","):
                base = _CGROUP / "memory" if kinds else _CGROUP
                own = base / name
                groups |= {folder for folder in (own, *own.parents) if folder.is_relative_to(base)}
    return groups


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps about a block of the model."""
    if sys.platform == "linux" and hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what it frees, for work that wants blocks of one size again and again.

    glibc gives blocks of more than 32 MiB back at once, and each page of the next is a fault: a
    tenth of the time of a training step on the demo model.
    """
    if sys.platform != "linux" or not hasattr(_C_LIBRARY, "mallopt"):
        yield
        return
    map_from, trim_from = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    _C_LIBRARY.mallopt(map_from, 2**30)
    _C_LIBRARY.mallopt(trim_from, 2**31 - 1)
    try:
        yield
    finally:  # what glibc comes to by itself
        _C_LIBRARY.mallopt(map_from, 2**25)
        _C_LIBRARY.mallopt(trim_from, 2**26)
        release_memory()


def will_need(tensors: Iterable[Tensor]) -> None:
    """Ask the system to read the mapped files behind tensors while something else is computed."""
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes:
            start = tensor.data_ptr() // page * page
            length = tensor.data_ptr() + tensor.nbytes - start
            _C_LIBRARY.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 3)  # MADV_WILLNEED


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors of one size, in memory, are the same byte for byte."""
    assert one.device.type == other.device.type == "cpu"
    places = ctypes.c_void_p(one.data_ptr()), ctypes.c_void_p(other.data_ptr())
    return not _C_LIBRARY.memcmp(*places, ctypes.c_size_t(one.nbytes))


def _bytes_in(file: Path, key: str) -> int | None:
    """The bytes that a file of /proc gives for a key, None where the system does not tell."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


class MappedFiles:
    """Where this process has mapped some files into memory; nowhere where the system does not
    tell.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        wanted = {str(file.resolve()): file for file in files}
        maps = Path("/proc/self/maps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        self._starts, self._files = list[int](), list[tuple[int, Path, int]]()
        for addresses, _, offset, *_, name in (line.split(maxsplit=5) for line in lines):
            if name in wanted:
                start, stop = (int(address, 16) for address in addresses.split("-"))
                self._starts.append(start)  # in ascending order
                self._files.append((stop, wanted[name], int(offset, 16)))

    def at(self, tensor: Tensor) -> tuple[Path, int] | None:
        """The file and the offset at which a contiguous tensor lies, None where it lies in none."""
        start = tensor.data_ptr()
        if (number := bisect_right(self._starts, start) - 1) < 0 or not tensor.is_contiguous():
            return None
        stop, file, offset = self._files[number]
        inside = tensor.device.type == "cpu" and start + tensor.nbytes <= stop
        return (file, offset + start - self._starts[number]) if inside else None


def anonymous_bytes() -> int | None:
    """The anonymous resident memory of this process, or None where the system does not tell."""
    return _bytes_in(Path("/proc/self/status"), "RssAnon")


def resident_bytes() -> int | None:
    """All resident memory of this process, mapped files included; None where it is unknown."""
    return _bytes_in(Path("/proc/self/status"), "VmRSS")


class PeakMemory:
    """The largest `anonymous_bytes()` between entering and leaving; `bytes` None if unknown.

    Memory freed before is given back first, and does not count. `kind` asks for another kind.
    """

    def __init__(self, kind: Callable[[], int | None] = anonymous_bytes) -> None:
        release_memory()
        self._kind, self.bytes = kind, kind()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        if (now := self._kind()) is not None:
            self.bytes = max(self.bytes or 0, now)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._look()
        self._stop.set()
        self._thread.join()
