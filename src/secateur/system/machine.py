"""Where a figure was measured: the machine and the versions that stand beside it."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.system.clock import CPU, best_seconds

_C_LIBRARY = ctypes.CDLL(None)
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CGROUP_FILES = [  # the limit, what is used, and how much of that is cache which can be had back; version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


def versions() -> dict[str, str]:
    """The versions of everything that can change a result."""
    packages = ("secateur", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "megahertz": _clocks(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _clocks() -> list[float]:
    """What each core runs at now, as the system says; empty where it does not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; of the processor, what the system and the process's
    group allow.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for folder, names in product(_memory_groups(), _CGROUP_FILES):
        with suppress(OSError, ValueError):  # not there, not readable, or "max"
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            free.append(max(limit - used + _cached(folder, names[2]), 0))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _cached(folder: Path, name: str) -> int:
    """Of what a control group uses, the cache that can be had back; 0 where it does not say."""
    with suppress(OSError, ValueError, KeyError):
        return int(
            dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())[
                name
            ]
        )
    return 0


def _memory_groups() -> set[Path]:
    """The folders of the memory control group of this process and of those that it is in, all of
    which may limit it.
    """
    found = {_CGROUP, _CGROUP / "memory"}
    with suppress(OSError):
        for kinds, name in re.findall(r"^\d+:(.*?):/?(.*)$", _OWN_CGROUP.read_text(), re.MULTILINE):
            if not kinds or "memory" in kinds.split(","):
                base = _CGROUP / "memory" if kinds else _CGROUP
                own = base / name
                found |= {folder for folder in (own, *own.parents) if folder.is_relative_to(base)}
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device = CPU, seconds: float = 0.2) -> float:
    """Operations a second of square products in `dtype`, the best of those that fit into `seconds`,
    at least two.

    Wall time, on as many threads as torch uses now: other work on the machine shows. The numbers
    are random, since GPUs multiply what is all the same faster.
    """
    side = square_side(device)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: torch.mm(a, b), device, seconds)


def square_side(device: torch.device) -> int:
    """Rows of a square matrix whose product takes long enough to be timed: a GPU has 1024 × 1024 in
    its launch.
    """
    return 8192 if device.type == "cuda" else 1024


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; where it does not, torch does so more slowly than
    float32.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def release_memory() -> None:
    """Give freed memory back to the system. glibc keeps blocks between live tensors, about a block
    of the model.
    """
    if sys.platform == "linux" and hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what it frees, for work that wants blocks of the same sizes again and
    again.

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
    """Ask the system to read the mapped files behind tensors ahead, while something else is
    computed.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes:
            start = tensor.data_ptr() // page * page
            _C_LIBRARY.madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start),
                3,
            )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
