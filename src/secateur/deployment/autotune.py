"""Which product a layer uses for how many rows of x: timed once for each kind of matrix."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Crossover:
    """The fastest way to multiply by a packed matrix, for each number of rows of x.

    `ways` says which of `WAYS`, or `dense` where the dense matrix is kept, is used from which batch
    on; `gains` for each of `BATCHES` how many times faster than torch's own dense product it is,
    as far as that one was tried.
    """

    ways: dict[int, str]
    gains: dict[int, float]

    def way(self, batch: int) -> str:
        return self.ways[max((b for b in self.ways if b <= batch), default=min(self.ways))]


UNMEASURED = Crossover({1: "packed", MOST + 1: "unpacked"}, {})


def measure_crossover(packed: Packed, dtype: torch.dtype, *, keep_dense: bool) -> Crossover:
    """The fastest way for each of `BATCHES`, activations in `dtype`, the best of a few calls each.

    `dense` may win only with `keep_dense`; a gain under 1 says where it would have.
    """
    dense = packed.dense(dtype=dtype)
    compiled = packed.values.dtype in KINDS and library() is not None
    tried: dict[str, Way] = dict(WAYS) if compiled else {"unpacked": multiply_unpacked}
    tried["dense"] = lambda packed, x: linear(x, dense)
    ways: dict[int, str] = {}
    gains: dict[int, float] = {}
    for batch in BATCHES:
        draw = torch.Generator().manual_seed(batch)
        seconds = _best_of_few(
            tried, packed, torch.randn(batch, packed.columns, generator=draw).to(dtype)
        )
        allowed = [name for name in seconds if keep_dense or name != "dense"]
        ways[batch] = min(allowed, key=seconds.__getitem__)
        if "dense" in seconds:
            gains[batch] = seconds["dense"] / seconds[ways[batch]]
        if batch > MOST:  # the small batches decide little, and the first call of a way is slow
            hopeless = HOPELESS * seconds[ways[batch]]
            tried = {name: way for name, way in tried.items() if seconds[name] <= hopeless}
    return Crossover(ways, gains)


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
        self.measured: dict[tuple[int, int, float, torch.dtype], Crossover] = {}

    def of(self, packed: Packed) -> Crossover:
        sparsity = round(20 * (1 - int(packed.starts[-1]) / (packed.rows * packed.columns))) / 20
        kind = (packed.rows, packed.columns, sparsity, packed.values.dtype)
        if kind not in self.measured:
            self.measured[kind] = measure_crossover(packed, self.dtype, keep_dense=self.keep_dense)
        return self.measured[kind]
