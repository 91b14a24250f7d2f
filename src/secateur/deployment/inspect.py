"""What a checkpoint folder really holds: read from its tensors, one at a time, whoever wrote it.

The model is built without memory for its weights, to learn which parameters are weight matrices and
which way they lie; the numbers come from the shards. A folder whose architecture transformers does
not know is read as well: then every matrix counts, and coverage is unknown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.checkpoints.record import record_of
from secateur.errors import UnsupportedModel
from secateur.methods.patterns import NM
from secateur.models.load import resolve
from secateur.models.stored import stored_matrices, unknown_matrices
from secateur.system.settings import Trust

PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16))
"""The N:M patterns that are looked for."""


@dataclass(frozen=True)
class TensorReport:
    """What a tensor holds that is a weight matrix, or several; the N:M patterns that it meets."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    patterns: tuple[str, ...]
    negative_zeros: int
    nans: int
    infs: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` returns. `coverage` is the share of block weights in matrices, if known."""

    folder: str
    sparsity: float
    coverage: float | None
    tensors: tuple[TensorReport, ...]
    record: dict[str, Any] | None


def inspect(
    model: str | Path | None = None, *, trust_remote_code: bool = Trust.trust_remote_code
) -> Inspection:
    """Sparsity and patterns of every weight matrix of a checkpoint folder. Raises BadCheckpoint."""
    folder = resolve(model)
    checkpoint = open_checkpoint(folder)
    try:
        stored, coverage = stored_matrices(checkpoint, trust_remote_code=trust_remote_code)
    except UnsupportedModel:
        stored, coverage = unknown_matrices(checkpoint), None
    reports = tuple(_report(checkpoint, name, matrix.transposed) for name, matrix in stored.items())
    sizes = [prod(report.shape) for report in reports]
    zeros = sum(size * report.sparsity for size, report in zip(sizes, reports, strict=True))
    sparsity = zeros / max(sum(sizes), 1)
    return Inspection(str(folder), sparsity, coverage, reports, record_of(folder))


def _report(checkpoint: Checkpoint, name: str, transposed: bool) -> TensorReport:
    tensor = checkpoint.tensor(name)
    place = checkpoint.places[name]
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
        return TensorReport(name, place.shape, place.dtype, 0.0, (), 0, 0, 0)
    zero = tensor == 0
    weight = tensor.transpose(-1, -2) if transposed else tensor
    return TensorReport(
        name,
        place.shape,
        place.dtype,
        zero.float().mean(dtype=torch.float64).item(),
        tuple(str(pattern) for pattern in PATTERNS if pattern.holds(weight)),
        int((zero & tensor.signbit()).sum()),
        int(tensor.isnan().sum()),
        int(tensor.isinf().sum()),
    )


def rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    """The table: tensor, shape, dtype, sparsity, patterns, odd values."""
    for tensor in inspection.tensors:
        counts = {"-0.0": tensor.negative_zeros, "NaN": tensor.nans, "Inf": tensor.infs}
        yield (
            tensor.name,
            "×".join(map(str, tensor.shape)),
            tensor.dtype,
            f"{tensor.sparsity:.2%}",
            " ".join(tensor.patterns),
            ", ".join(f"{count} {what}" for what, count in counts.items() if count),
        )
