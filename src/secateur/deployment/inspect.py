"""What a checkpoint folder really holds: read from its tensors, one at a time, whoever wrote it.

The model is built without memory for its weights, to learn which parameters are sites and which way
they lie; the numbers come from the shards. A folder whose architecture transformers does not know
is read as well: then every matrix counts, and coverage is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
"""The N:M patterns that are looked for, with those that `pruning.json` names."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the checkpoint that is a site, or several. `patterns` are the N:M patterns it
    satisfies.
    """

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
    """What `inspect` returns. `coverage` is the share of block weights that are sites, None where
    unknown.
    """

    folder: str
    sparsity: float
    coverage: float | None
    tensors: tuple[TensorReport, ...]
    record: dict[str, Any] | None


def inspect(
    model: str | Path | None = None, *, trust_remote_code: bool = Trust.trust_remote_code
) -> Inspection:
    """The realised sparsity and patterns of every site of a checkpoint folder. Raises
    BadCheckpoint.
    """
    folder = resolve(model)
    checkpoint = open_checkpoint(folder)
    try:
        stored, coverage = stored_matrices(checkpoint, trust_remote_code=trust_remote_code)
    except UnsupportedModel:
        stored, coverage = unknown_matrices(checkpoint), None
    reports = [_read(checkpoint, name, held.transposed) for name, held in stored.items()]
    sizes = [torch.Size(report.shape).numel() for report in reports]
    zeros = sum(size * report.sparsity for size, report in zip(sizes, reports, strict=True))
    return Inspection(
        str(folder), zeros / max(sum(sizes), 1), coverage, tuple(reports), record_of(folder)
    )


def _read(checkpoint: Checkpoint, name: str, transposed: bool) -> TensorReport:
    tensor = checkpoint.tensor(name)
    place = checkpoint.places[name]
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
        return TensorReport(name, place.shape, place.dtype, 0.0, (), 0, 0, 0)
    zero = tensor == 0
    lying = tensor.transpose(-1, -2) if transposed else tensor
    return TensorReport(
        name,
        place.shape,
        place.dtype,
        zero.float().mean(dtype=torch.float64).item(),
        tuple(str(pattern) for pattern in PATTERNS if pattern.holds(lying)),
        int((zero & tensor.signbit()).sum()),
        int(tensor.isnan().sum()),
        int(tensor.isinf().sum()),
    )


def rows(found: Inspection) -> Iterator[tuple[str, ...]]:
    """The lines of the table that the command prints."""
    for tensor in found.tensors:
        odd = [
            f"{count} {what}"
            for count, what in (
                (tensor.negative_zeros, "-0.0"),
                (tensor.nans, "NaN"),
                (tensor.infs, "Inf"),
            )
            if count
        ]
        shape = "×".join(map(str, tensor.shape))
        yield (
            tensor.name,
            shape,
            tensor.dtype,
            f"{tensor.sparsity:.2%}",
            " ".join(tensor.patterns),
            ", ".join(odd),
        )
