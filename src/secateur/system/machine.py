"""Where a figure was measured: the machine and the versions that stand beside it."""

import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secateur.system.clock import CPU, best_seconds


def typed_command(command: Sequence[str] | None) -> list[str]:
    """The command that stands in a record: `command`, for None what this process was started as."""
    return list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]


def versions() -> dict[str, str]:
    """The versions of everything that can change a result."""
    packages = ("secateur", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine."""
    return {
        "processor": (_of_cores("model name") or [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "megahertz": [float(clock) for clock in _of_cores("cpu MHz")],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _of_cores(key: str) -> list[str]:
    """The values of a key in /proc/cpuinfo, one a core; none where the system has no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def matrix_rate(dtype: torch.dtype, device: torch.device = CPU, seconds: float = 0.2) -> float:
    """Operations a second of square products in `dtype`, the best of those that fit into `seconds`.

    Wall time, on as many threads as torch uses now: other work on the machine shows. The numbers
    are random, since GPUs multiply what is all the same faster.
    """
    side = square_side(device)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: torch.mm(a, b), device, seconds)


def square_side(device: torch.device) -> int:
    """Rows of a square matrix whose product takes long enough to be timed, not only launched."""
    return 8192 if device.type == "cuda" else 1024


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; if not, torch is slower in it than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
