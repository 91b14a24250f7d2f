"""How long work takes: wall time, on the processor and on devices.

Single products on a GPU are timed by the device itself (kernels/device.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch

Name = TypeVar("Name")
Result = TypeVar("Result")
CPU = torch.device("cpu")


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
