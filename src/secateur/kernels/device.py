"""What the kernels and runtimes for GPUs share: whether there is a device, and what a product takes
on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
"""The first devices that multiply bfloat16 and 2:4 matrices, and copy to shared memory without
registers.
"""


def no_device() -> str | None:
    """Why there is no device for these products, None where there is one."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip:
        return "torch for ROCm was not tried here; an NVIDIA device is wanted"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        return "the device has compute capability {}.{}; 8.0 or more is wanted".format(*found)
    return None


def milliseconds(call: Callable[[], object]) -> float:
    """What a call takes on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cold_milliseconds(call: Callable[[], object], flush: Tensor) -> float:
    """The median of seven calls that find nothing of theirs in the cache, after one that may
    compile.

    `flush` is written before each call; it is larger than the device's cache.
    """
    call()
    times = []
    for _ in range(7):
        flush.zero_()
        times.append(milliseconds(call))
    return sorted(times)[3]


def beyond_cache(device: torch.device) -> Tensor:
    """Memory to write to, several times as large as the cache of any device of today."""
    return torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
