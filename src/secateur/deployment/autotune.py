"""Which product a layer uses for how many rows of x: timed once for each kind of matrix."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.kernels.device import fastest
from secateur.kernels.library import library
from secateur.kernels.packed import KINDS, MOST, Packed, multiply, multiply_unpacked
from secateur.system.clock import turns

Choice = TypeVar("Choice")

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of x for which packed products are timed on the CPU; between, the smaller one counts."""
REPEATS, ENOUGH, HOPELESS = 5, 0.05, 3.0
"""Calls of each way, seconds that are enough, and how many times the best is hopeless."""
Way = Callable[[Packed, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "packed": multiply,
    "unpacked": multiply_unpacked,
    "unpacked to float32": lambda packed, x: multiply_unpacked(packed, x, torch.float32),
}
"""How a packed matrix can be multiplied on the CPU. A large batch is better served by a dense
product of some unpacked rows at a time, in whichever dtype this machine is better at.
"""


def fastest_by_rows(
    classes: Sequence[int],
    weight: Tensor,
    products: Callable[[Tensor], Mapping[Choice, Callable[[], object]]],
) -> tuple[Choice, ...]:
    """Time `products(x)` for each number of rows in `classes`, and return the fastest of each.

    x is `[rows, in]`, on the CUDA device and in the dtype of a weight `[out, in]`; nothing of the
    matrix is in the cache.
    """
    choices = []
    for rows in classes:
        x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        choices.append(fastest(products(x), weight.device))
    return tuple(choices)


def choice_for(choices: Sequence[Choice], classes: Sequence[int], rows: int) -> Choice:
    """What was chosen for the next larger of `classes`, or for the last."""
    return choices[min(bisect_left(classes, rows), len(classes) - 1)]


Crossover = Mapping[int, str]
"""From which number of rows of x on which of `WAYS` is used, or `dense`."""
UNMEASURED: Crossover = {1: "packed", MOST + 1: "unpacked"}


def way_for(crossover: Crossover, rows: int) -> str:
    """The way for some rows of x: that of the next smaller number, or of the first."""
    return crossover[max((one for one in crossover if one <= rows), default=min(crossover))]


def measure_crossover(packed: Packed, dtype: torch.dtype, *, keep_dense: bool) -> Crossover:
    """The fastest way for each of `BATCHES`, activations in `dtype`, the best of a few calls each.

    `dense` is tried only with `keep_dense`.
    """
    compiled = packed.values.dtype in KINDS and library() is not None
    tried: dict[str, Way] = dict(WAYS) if compiled else {"unpacked": multiply_unpacked}
    if keep_dense:
        dense = packed.dense(dtype=dtype)
        tried["dense"] = lambda packed, x: linear(x, dense)
    ways: dict[int, str] = {}
    for batch in BATCHES:
        draw = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, packed.columns, generator=draw).to(dtype)
        seconds = _best_of_few(tried, packed, x)
        ways[batch] = min(seconds, key=seconds.__getitem__)
        if batch > MOST:  # the small batches decide little, and the first call of a way is slow
            hopeless = HOPELESS * seconds[ways[batch]]
            tried = {name: way for name, way in tried.items() if seconds[name] <= hopeless}
    return ways


def _best_of_few(ways: Mapping[str, Way], packed: Packed, x: Tensor) -> dict[str, float]:
    works = {name: lambda way=way: way(packed, x) for name, way in ways.items()}
    best, started = dict.fromkeys(ways, float("inf")), perf_counter()
    for number, seconds in enumerate(islice(turns(works), REPEATS)):
        best = {name: min(best[name], seconds[name]) for name in best}
        if number and perf_counter() - started > ENOUGH:
            break
    return best


class Crossovers:
    """Crossovers for activations in `dtype`, measured once for each kind of packed matrix."""

    def __init__(self, dtype: torch.dtype, *, keep_dense: bool = False) -> None:
        self.dtype, self.keep_dense = dtype, keep_dense
        self.measured: dict[tuple[object, ...], Crossover] = {}

    def of(self, packed: Packed) -> Crossover:
        sparsity = round(20 * (1 - packed.kept / (packed.rows * packed.columns))) / 20
        kind = (packed.rows, packed.columns, sparsity, packed.values.dtype, packed.bits)
        if kind not in self.measured:
            self.measured[kind] = measure_crossover(packed, self.dtype, keep_dense=self.keep_dense)
        return self.measured[kind]
