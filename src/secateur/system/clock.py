"""How long work takes, on the processor and on a device: the one clock of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Name = TypeVar("Name")
Result = TypeVar("Result")
CPU = torch.device("cpu")
BEYOND_CACHE = 256 * 2**20
"""Bytes several times as large as the cache of any device of today."""


def timed(work: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, float]:
    """What `work` returns, and the wall seconds until the device had done all of it."""
    started = perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, perf_counter() - started


def best_seconds(
    work: Callable[[], object], device: torch.device = CPU, seconds: float = 0.2
) -> float:
    """Wall time of `work` on a device, the best of those that fit into `seconds`, at least two."""
    best, count, started = float("inf"), 0, perf_counter()
    while count < 2 or perf_counter() - started < seconds:
        best, count = min(best, timed(work, device)[1]), count + 1
    return best


def turns(works: Mapping[Name, Callable[[], object]]) -> Iterator[dict[Name, float]]:
    """Rounds without end in which each work takes its turn, as wall seconds by its name.

    Whatever else the machine does falls on all of them, so times of one round make a fair ratio.
    """
    while True:
        yield {name: timed(work)[1] for name, work in works.items()}


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The lower tenth, the median and the upper tenth of some times."""
    low, middle, high = np.percentile(seconds, [10, 50, 90])
    return float(low), float(middle), float(high)


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
