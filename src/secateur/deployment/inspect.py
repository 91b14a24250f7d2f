"""What a checkpoint folder really holds: read from its tensors, one at a time, whoever wrote it.

The model is built without memory for its weights, to learn which parameters are weight matrices and
which way they lie; the numbers come from the shards. A quantised checkpoint is decoded tensor by
tensor. A folder whose architecture transformers does not know is read as well: then every matrix
counts, and coverage is unknown. What cannot be counted, such as packed integers of a format that is
not read, is unknown, and never taken for a zero.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from secateur.checkpoints.folder import DTYPES, Checkpoint, open_checkpoint
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, readable_checkpoint
from secateur.checkpoints.record import record_of
from secateur.errors import UnsupportedModel
from secateur.kernels.counts import GROUPS, count
from secateur.methods.patterns import NM
from secateur.models.load import locate
from secateur.models.stored import stored_matrices, unknown_matrices
from secateur.system.settings import Trust, taken
from secateur.system.tensors import FLOAT8

PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16))
"""The N:M patterns that are looked for."""
BLOCKS = "weight matrices of blocks"
UNKNOWN = "matrices, whatever they are"
PARTS = (
    ("towers", r"vision|visual|audio|speech|image|tower|projector|connector"),
    ("embeddings and head", r"embed|lm_head|\b(wte|wpe|output_layer|score|classifier)\b"),
    ("draft heads", r"\b(mtp|nextn|eagle|medusa)"),
)
"""The parts of a model that are no weight matrices of its blocks, by a part of a tensor's name."""


@dataclass(frozen=True)
class TensorReport:
    """What a tensor holds that is a weight matrix, or several; the N:M patterns that it meets.

    `sparsity` is None where its zeros cannot be counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    patterns: tuple[str, ...]
    negative_zeros: int
    nans: int
    infs: int


@dataclass(frozen=True)
class PartReport:
    """A part of a model: how many tensors and numbers it has, and the share of zeros, if known."""

    name: str
    tensors: int
    numbers: int
    sparsity: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` returns. `sparsity` is that of the weight matrices, `coverage` the share of
    block weights in them; None where they are unknown. `format` says how a quantised one is stored.
    """

    folder: str
    sparsity: float | None
    coverage: float | None
    tensors: tuple[TensorReport, ...]
    record: dict[str, Any] | None
    parts: tuple[PartReport, ...] = ()
    format: str | None = None


def inspect(
    model: str | Path | None = None,
    *,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
) -> Inspection:
    """Sparsity and patterns of every weight matrix of a checkpoint folder. Raises BadCheckpoint."""
    folder = locate(model, taken(Trust, locals()))
    try:
        checkpoint = readable_checkpoint(folder)
        stored, coverage = stored_matrices(checkpoint, trust_remote_code=trust_remote_code)
        blocks = BLOCKS
    except UnsupportedModel:
        checkpoint = _whatever(folder)
        stored, coverage, blocks = unknown_matrices(checkpoint), None, UNKNOWN
    reports = tuple(_report(checkpoint, name, matrix.transposed) for name, matrix in stored.items())
    sizes = [prod(report.shape) for report in reports]
    shares = [report.sparsity for report in reports]
    first = PartReport(blocks, len(reports), sum(sizes), _mean(sizes, shares))
    parts = (first, *_other_parts(checkpoint, stored)) if reports else ()
    format = checkpoint.source.format if isinstance(checkpoint, DecodedCheckpoint) else None
    record = record_of(folder)
    return Inspection(str(folder), first.sparsity, coverage, reports, record, parts, format)


def _whatever(folder: Path) -> Checkpoint:
    """A checkpoint whose format or architecture is not known; decoded if the format is."""
    try:
        return readable_checkpoint(folder)
    except UnsupportedModel:
        return open_checkpoint(folder)


def _mean(sizes: list[int], shares: list[float | None]) -> float | None:
    """The share of zeros of tensors of such sizes; None where that of one is not known."""
    zeros = 0.0
    for size, share in zip(sizes, shares, strict=True):
        if share is None:
            return None
        zeros += size * share
    return zeros / max(sum(sizes), 1)


def _other_parts(checkpoint: Checkpoint, stored: Any) -> Iterator[PartReport]:
    """The matrices of a checkpoint that are not among the `stored` ones, by what they are part of.

    Vectors, which nobody prunes, are left out.
    """
    groups: dict[str, list[str]] = {}
    for name, place in checkpoint.places.items():
        if name not in stored and len(place.shape) > 1:
            part = next((part for part, names in PARTS if re.search(names, name)), "other matrices")
            groups.setdefault(part, []).append(name)
    for part, names in groups.items():
        sizes = [prod(checkpoint.places[name].shape) for name in names]
        shares = [_report(checkpoint, name, transposed=False).sparsity for name in names]
        yield PartReport(part, len(names), sum(sizes), _mean(sizes, shares))


def _report(checkpoint: Checkpoint, name: str, transposed: bool) -> TensorReport:
    place = checkpoint.places[name]
    unknown = TensorReport(name, place.shape, place.dtype, None, (), 0, 0, 0)
    if not isinstance(checkpoint, DecodedCheckpoint) and place.dtype not in DTYPES:
        return unknown
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in FLOAT8 and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
        return unknown
    weight = tensor.transpose(-1, -2) if transposed else tensor
    counts, wide = count(weight), weight.shape[-1] if weight.numel() else 0
    densest: dict[int, int] = dict(zip(GROUPS, counts.densest, strict=True))
    return TensorReport(
        name,
        place.shape,
        place.dtype,
        counts.zeros / max(weight.numel(), 1),
        tuple(
            str(one) for one in PATTERNS if wide and not wide % one.m and densest[one.m] <= one.n
        ),
        counts.negative_zeros,
        counts.nans,
        counts.infs,
    )


def share_in_words(share: float | None) -> str:
    """A share of zeros as people read it."""
    return "unknown" if share is None else f"{share:.2%}"


def rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    """The table: tensor, shape, dtype, sparsity, patterns, odd values."""
    for tensor in inspection.tensors:
        counts = {"-0.0": tensor.negative_zeros, "NaN": tensor.nans, "Inf": tensor.infs}
        yield (
            tensor.name,
            "×".join(map(str, tensor.shape)),
            tensor.dtype,
            share_in_words(tensor.sparsity),
            " ".join(tensor.patterns),
            ", ".join(f"{count} {what}" for what, count in counts.items() if count),
        )
