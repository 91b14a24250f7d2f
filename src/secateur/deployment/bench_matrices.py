"""Times single matrices of a model, dense and with their zeros used, to see where zeros pay.

Every kernel takes its turn in every round, multiplies by a few copies one after the other, as a
model does by its layers, and walks over copies that together exceed the last-level cache, so that
weights come from memory. Ratios are medians over rounds of paired times; `bytes` is the ratio of
what is read, which is what a product that only waits for memory can gain.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.packing import LEAST, fitting, pack_matrix, packed_values
from secateur.kernels.packed import dense_product, multiply, quantised
from secateur.methods.values import AS_STORED
from secateur.models.load import resolve
from secateur.models.stored import stored_matrices
from secateur.system.clock import spread, turns
from secateur.system.devices import timed_dtype
from secateur.system.files import disk_errors
from secateur.system.json_files import write_json
from secateur.system.machine import machine, versions
from secateur.system.progress import Progress
from secateur.system.settings import TimedRuns, Trust
from secateur.system.tensors import count_zeros

BEYOND_CACHE, IN_A_ROW = 400e6, 4
"""Bytes of the copies of one matrix, together, and how many a kernel multiplies by in its turn."""
WARM_UP = 3
"""Rounds that are not counted."""


class Prepared(NamedTuple):
    """A matrix as a kernel wants it: its product with x `[batch, columns]`, and the bytes read."""

    product: Callable[[Tensor], object]
    bytes: int


KERNELS = ("torch", "own dense", "own int8", "packed", "packed int8", "packed int4")
"""The kernels that are timed; the own ones, which are dense, are for batch 1."""


def _prepared(kernel: str, weight: Tensor) -> Prepared | None:
    """A matrix `[rows, columns]` for one of `KERNELS`; None where there is none for it here."""
    if kernel == "torch":
        return Prepared(lambda x: linear(x, weight), weight.nbytes)
    if kernel.startswith("packed"):
        values = packed_values(kernel.removeprefix("packed").strip() or AS_STORED)
        packed = pack_matrix(weight, values and fitting(values, weight.shape[1]))
        return Prepared(lambda x: multiply(packed, x), packed.bytes)
    stored, scales = quantised(weight) if kernel.endswith("int8") else (weight, None)
    dtype = weight.dtype if scales is None else torch.float32
    if dense_product(stored, torch.zeros(weight.shape[1], dtype=dtype), scales) is None:
        return None
    size = stored.nbytes + (0 if scales is None else scales.nbytes)
    return Prepared(lambda x: dense_product(stored, x[0].to(dtype), scales), size)


@dataclass
class LayerTiming:
    """One kernel on one matrix at one batch.

    `seconds` are [10 %, median, 90 %] over rounds. `over` says how many times faster it is than
    torch's kernel and, where there is one, than our own dense kernel with the same values; `bytes`,
    how many times less it reads than torch's.
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
    matrices: Mapping[str, Tensor], runs: TimedRuns, progress: Progress | None = None
) -> list[LayerTiming]:
    """Time every kernel on matrices `[rows, columns]` on the CPU, by the name of each matrix."""
    progress = progress or Progress()
    timings = []
    for number, (matrix, weight) in enumerate(matrices.items()):
        sparsity = count_zeros(weight) / weight.numel()
        copies = _copies(weight, sparsity)
        shape = (weight.shape[0], weight.shape[1])
        for size in runs.batch:
            seconds = _rounds(copies, weight, size, runs.rounds)
            timings += [
                LayerTiming(
                    matrix,
                    shape,
                    sparsity,
                    size,
                    name,
                    spread(times),
                    weight.nbytes / copies[name][0].bytes,
                    _ratios(name, seconds),
                )
                for name, times in seconds.items()
            ]
        progress.advance("matrices", number + 1, len(matrices))
    return timings


def _copies(weight: Tensor, sparsity: float) -> dict[str, list[Prepared]]:
    """For each kernel that takes a matrix, so many copies of it that they exceed the cache."""
    copies = {}
    for name in KERNELS:
        if sparsity < LEAST and name.startswith("packed"):
            continue
        if (first := _prepared(name, weight)) is not None:
            count = int(BEYOND_CACHE // first.bytes)
            others = (_prepared(name, weight.roll(rows, 0)) for rows in range(1, count + 1))
            copies[name] = [first, *filter(None, others)]
    return copies


def _rounds(
    copies: Mapping[str, list[Prepared]], weight: Tensor, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of one product by kernel, in each round."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, weight.shape[1], generator=draw).to(weight.dtype)
    works = {
        name: partial(_multiply_in_a_row, cycle(same), x)
        for name, same in copies.items()
        if batch == 1 or not name.startswith("own")
    }
    kept = list(islice(turns(works), WARM_UP, WARM_UP + rounds))
    return {name: [seconds[name] / IN_A_ROW for seconds in kept] for name in works}


def _multiply_in_a_row(copies: Iterator[Prepared], x: Tensor) -> None:
    for prepared in islice(copies, IN_A_ROW):
        prepared.product(x)


def _ratios(name: str, seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """How many times faster a kernel is than torch and than our dense one with the same values."""
    own = np.asarray(seconds[name])
    dense = {"own int8": "own int8", "packed int8": "own int8", "packed int4": None}
    others = ("torch", dense.get(name, "own dense"))
    return {
        other: float(np.median(np.asarray(seconds[other]) / own))
        for other in others
        if other and other in seconds
    }


def time_layers(
    models: Sequence[str | Path],
    runs: TimedRuns,
    progress: Progress | None = None,
    trust: Trust | None = None,
) -> list[LayerTiming]:
    """Time a matrix of each shape of every model. Raises UnknownName, BadCheckpoint."""
    dtype = timed_dtype(runs.dtype)
    progress, trust = progress or Progress(), trust or Trust()
    matrices: dict[str, Tensor] = {}
    for model in models:
        checkpoint = open_checkpoint(resolve(model, trust, progress=progress))
        kinds = set()
        trusted = trust.trust_remote_code
        of_model, _ = stored_matrices(checkpoint, trust_remote_code=trusted)
        for name, stored in of_model.items():
            kind = (checkpoint.places[name].shape, stored.transposed)
            if len(kind[0]) == 2 and kind not in kinds:
                kinds.add(kind)
                tensor = checkpoint.tensor(name).to(dtype)
                weight = tensor.T if stored.transposed else tensor
                matrices[f"{Path(model).name} {name}"] = weight.contiguous()
    progress.begin("timing single matrices")
    timings = time_matrices(matrices, runs, progress)
    progress.end()
    return timings


def write_timings(timings: Sequence[LayerTiming], file: Path, command: Sequence[str]) -> None:
    """Write timings, the machine and the versions as JSON. Raises OutputRefused or DiskFull."""
    content = {
        "command": list(command),
        "machine": machine(),
        "versions": versions(),
        "layers": [asdict(timing) for timing in timings],
    }
    with disk_errors(file):
        write_json(file, content)
