"""Single matrices of a model, dense and with their zeros used, at several batches: the table that
says where zeros pay.

Every kernel takes its turn in every round, multiplies by a few copies one after the other, as a
model does by its layers, and walks over copies that together exceed the last-level cache, so that
weights come from memory. Ratios are medians over rounds of paired times; `bytes` is the ratio of
what is read, which is what a product that only waits for memory can gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.packed_model import LEAST
from secateur.kernels.packed import dense_product, multiply, pack, pack_int8, quantised
from secateur.models.load import resolve
from secateur.models.stored import stored_matrices
from secateur.system.devices import timed_dtype
from secateur.system.files import disk_errors
from secateur.system.json_files import write_json
from secateur.system.machine import machine, versions
from secateur.system.progress import Progress
from secateur.system.tensors import count_zeros

BEYOND_CACHE, IN_A_ROW = 400e6, 4
"""Bytes of the copies of one matrix, together, and how many a kernel multiplies by before the next
takes its turn.
"""


class Held(NamedTuple):
    """A matrix as a kernel wants it: its product with x `[batch, columns]`, and the bytes that one
    reads.
    """

    product: Callable[[Tensor], object]
    bytes: int


def _torch(weight: Tensor) -> Held:
    return Held(lambda x: linear(x, weight), weight.nbytes)


def _own(weight: Tensor) -> Held | None:
    if dense_product(weight, torch.zeros(weight.shape[1], dtype=weight.dtype)) is None:
        return None
    return Held(lambda x: dense_product(weight, x[0]), weight.nbytes)


def _own_int8(weight: Tensor) -> Held | None:
    whole, scales = quantised(weight)
    if dense_product(whole, torch.zeros(weight.shape[1]), scales) is None:
        return None
    return Held(lambda x: dense_product(whole, x[0].float(), scales), whole.nbytes + scales.nbytes)


def _packed(weight: Tensor) -> Held:
    held = pack(weight)
    return Held(lambda x: multiply(held, x), held.bytes)


def _packed_int8(weight: Tensor) -> Held:
    held = pack_int8(weight)
    return Held(lambda x: multiply(held, x), held.bytes)


KERNELS: dict[str, Callable[[Tensor], Held | None]] = {
    "torch": _torch,
    "own dense": _own,
    "own int8": _own_int8,
    "packed": _packed,
    "packed int8": _packed_int8,
}
"""By name, what makes it from a matrix; None where this machine or the dtype has none. The own ones
are for batch 1.
"""


@dataclass
class LayerTiming:
    """One kernel on one matrix at one batch. `seconds` are [10 %, median, 90 %] over rounds; `over`
    says how many times faster than `torch`, and than our own dense kernel with the same values
    where there is one; `bytes` how many times less is read than by `torch`.
    """

    site: str
    shape: tuple[int, int]
    sparsity: float
    batch: int
    kernel: str
    seconds: tuple[float, float, float]
    bytes: float
    over: dict[str, float]


@torch.no_grad()
def time_matrices(
    matrices: Mapping[str, Tensor],
    *,
    batch: Sequence[int] = (1, 4, 8),
    rounds: int = 30,
    progress: Progress | None = None,
) -> list[LayerTiming]:
    """Time every kernel on matrices `[rows, columns]` on the CPU, by the name of their site."""
    progress = progress or Progress()
    found = []
    for number, (site, weight) in enumerate(matrices.items()):
        sparsity = count_zeros(weight) / weight.numel()
        copies: dict[str, list[Held]] = {}
        for name, make in KERNELS.items():
            if (sparsity < LEAST and name.startswith("packed")) or (first := make(weight)) is None:
                continue
            count = int(BEYOND_CACHE // first.bytes) + 1
            rolled = (make(weight.roll(place, 0)) for place in range(1, count))
            copies[name] = [first, *(held for held in rolled if held is not None)]
        for size in batch:
            x = torch.randn(size, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
                weight.dtype
            )
            usable = {
                name: held
                for name, held in copies.items()
                if size == 1 or not name.startswith("own")
            }
            seconds: dict[str, list[float]] = {name: [] for name in usable}
            for turn in range(-3, rounds):
                for name, held in usable.items():
                    products = [
                        held[(IN_A_ROW * turn + i) % len(held)].product for i in range(IN_A_ROW)
                    ]
                    started = perf_counter()
                    for product in products:
                        product(x)
                    if turn >= 0:
                        seconds[name].append((perf_counter() - started) / IN_A_ROW)
            for name, times in seconds.items():
                twin = "own int8" if name.endswith("int8") else "own dense"
                over = {
                    other: float(np.median(np.asarray(seconds[other]) / np.asarray(times)))
                    for other in ("torch", twin)
                    if other in seconds
                }
                low, middle, high = np.percentile(times, [10, 50, 90])
                found.append(
                    LayerTiming(
                        site,
                        (weight.shape[0], weight.shape[1]),
                        sparsity,
                        size,
                        name,
                        (float(low), float(middle), float(high)),
                        weight.nbytes / usable[name][0].bytes,
                        over,
                    )
                )
        progress.advance("matrices", number + 1, len(matrices))
    return found


def time_layers(
    models: Sequence[str | Path],
    *,
    dtype: str = "bfloat16",
    batch: Sequence[int] = (1, 4, 8),
    rounds: int = 30,
    progress: Progress | None = None,
) -> list[LayerTiming]:
    """Time a matrix of each shape of every model, dense and with its zeros used. Raises
    UnknownName, BadCheckpoint.
    """
    kind = timed_dtype(dtype)
    progress = progress or Progress()
    matrices: dict[str, Tensor] = {}
    for model in models:
        checkpoint = open_checkpoint(resolve(model))
        shapes = set()
        for name, held in stored_matrices(checkpoint)[0].items():
            shape = checkpoint.places[name].shape
            if len(shape) == 2 and (shape, held.transposed) not in shapes:
                shapes.add((shape, held.transposed))
                tensor = checkpoint.tensor(name).to(kind)
                matrices[f"{Path(model).name} {name}"] = (
                    tensor.T if held.transposed else tensor
                ).contiguous()
    progress.begin("timing single matrices")
    found = time_matrices(matrices, batch=batch, rounds=rounds, progress=progress)
    progress.end()
    return found


def write_timings(timings: Sequence[LayerTiming], file: Path, command: Sequence[str]) -> None:
    """Write what was timed to a JSON file, with the machine and the versions. Raises OutputRefused
    or DiskFull.
    """
    layers = [asdict(timing) for timing in timings]
    held = {
        "command": list(command),
        "machine": machine(),
        "versions": versions(),
        "layers": layers,
    }
    with disk_errors(file):
        write_json(file, held)
