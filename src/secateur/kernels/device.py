"""Whether there is a GPU that the products here can run on, and what a product takes on it."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from secateur.errors import BadCheckpoint

Name = TypeVar("Name")
DTYPES = (torch.float16, torch.bfloat16)
"""What matrices are packed in for a device."""
BEYOND_CACHE = 256 * 2**20
"""Bytes several times as large as the cache of any device of today."""
LEAST_CAPABILITY = (8, 0)
"""The first that multiplies bfloat16 and 2:4, and copies to shared memory past registers."""


def no_device() -> str | None:
    """Why there is no device for these products, None where there is one."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip:
        return "torch for ROCm was not tried here; an NVIDIA device is wanted"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "the device has compute capability {}.{}; 8.0 or more is wanted".format(*capability)
    return None


def check_dtype(weight: Tensor, name: str) -> None:
    """Raise BadCheckpoint unless a weight is a matrix in one of `DTYPES`."""
    if weight.dtype not in DTYPES or weight.dim() != 2:
        raise BadCheckpoint(
            f"{name} is {weight.dtype} {list(weight.shape)}; "
            "a matrix in float16 or bfloat16 was wanted. Load the model with --dtype bfloat16."
        )


def milliseconds(work: Callable[[], object]) -> float:
    """What `work` takes on the current CUDA stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def fastest(works: Mapping[Name, Callable[[], object]], device: torch.device) -> Name:
    """The name of the work that takes least on a CUDA device; of equals the first."""
    flush = torch.empty(BEYOND_CACHE, dtype=torch.uint8, device=device)
    return min(works, key=lambda name: _cold_milliseconds(works[name], flush))


def _cold_milliseconds(work: Callable[[], object], flush: Tensor) -> float:
    """The median of seven calls with a cache full of `flush`, after one that may compile."""
    work()
    times = []
    for _ in range(7):
        flush.zero_()
        times.append(milliseconds(work))
    return sorted(times)[3]
