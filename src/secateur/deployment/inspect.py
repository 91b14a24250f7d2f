"""What a checkpoint folder really holds: read from its tensors, one at a time, whoever wrote it.

The model is built without memory for its weights, to learn which parameters are weight matrices and
which way they lie; the numbers come from the shards. A quantised checkpoint is decoded tensor by
tensor, and can be held against the pruned one that it was made of; so are the matrices that an ONNX
graph multiplies by, whatever they are called there. A folder whose architecture
transformers does not know is read as well: then every matrix counts, and coverage is unknown. What
cannot be counted, such as packed integers of a format that is not read, is unknown, and never taken
for a zero.
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import DTYPES, Checkpoint, open_checkpoint
from secateur.checkpoints.quantised.onnx import onnx_file, onnx_source
from secateur.checkpoints.quantised.reading import (
    DecodedCheckpoint,
    decoded_checkpoint,
    readable_checkpoint,
)
from secateur.checkpoints.record import record_of
from secateur.deployment.counterparts import named_after
from secateur.errors import BadCheckpoint, UnsupportedModel
from secateur.kernels.counts import GROUPS, count
from secateur.methods.patterns import NM
from secateur.models.load import locate
from secateur.models.stored import stored_matrices, unknown_matrices
from secateur.system.settings import Trust, taken
from secateur.system.tensors import FLOAT8, count_zeros, is_zero

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
class Against:
    """Zeros held against those of the pruned checkpoint that this one was made of: how many of its
    `pruned` weights `came_back`, and how many of those that it `kept` are zero here (`vanished`).
    """

    pruned: int
    came_back: int
    kept: int
    vanished: int

    def __add__(self, other: "Against") -> "Against":
        return Against(
            *(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True))
        )


@dataclass(frozen=True)
class TensorReport:
    """What a tensor holds that is a weight matrix, or several; the N:M patterns that it meets.

    `sparsity` is None where its zeros cannot be counted, and `against` where nothing was asked.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    patterns: tuple[str, ...]
    negative_zeros: int
    nans: int
    infs: int
    against: Against | None = None


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
    `against` sums up what became of the zeros of a pruned one, where that was asked.
    """

    folder: str
    sparsity: float | None
    coverage: float | None
    tensors: tuple[TensorReport, ...]
    record: dict[str, Any] | None
    parts: tuple[PartReport, ...] = ()
    format: str | None = None
    against: Against | None = None


def inspect(
    model: str | Path | None = None,
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
) -> Inspection:
    """Sparsity and patterns of every weight matrix of a checkpoint folder, or of an ONNX file.

    `against`: the pruned checkpoint that this one was quantised from, or made of otherwise; then
    also how many pruned weights came back, and how many kept ones became zero. Raises
    BadCheckpoint, also where the two do not have the same weight matrices.
    """
    trust = taken(Trust, locals())
    graph = None if model is None else onnx_file(Path(model))
    folder = locate(model if graph is None else graph.parent, trust)
    own = replace(trust, revision=None)  # which is the model's; NAME@REVISION says the other's
    pruned = None if against is None else readable_checkpoint(locate(against, own))
    coverage, blocks = None, UNKNOWN
    if graph is not None:
        folder, checkpoint = graph, decoded_checkpoint(onnx_source(graph))
        stored = unknown_matrices(checkpoint)
        if pruned is not None:
            checkpoint, stored = named_after(checkpoint, pruned)
    else:
        try:
            checkpoint = readable_checkpoint(folder)
            stored, coverage = stored_matrices(checkpoint, trust_remote_code=trust_remote_code)
            blocks = BLOCKS
        except UnsupportedModel:
            checkpoint = _whatever(folder)
            stored = unknown_matrices(checkpoint)
    transposed = {name: matrix.transposed for name, matrix in stored.items()}
    reports = _reports(checkpoint, transposed, pruned)
    held = [one.against for one in reports if one.against is not None]
    total = sum(held, start=Against(0, 0, 0, 0)) if pruned is not None else None
    sizes = [prod(report.shape) for report in reports]
    shares = [report.sparsity for report in reports]
    first = PartReport(blocks, len(reports), sum(sizes), _mean(sizes, shares))
    parts = (first, *_other_parts(checkpoint, stored)) if reports else ()
    format = checkpoint.source.format if isinstance(checkpoint, DecodedCheckpoint) else None
    record = record_of(folder)
    return Inspection(str(folder), first.sparsity, coverage, reports, record, parts, format, total)


def _whatever(folder: Path) -> Checkpoint:
    """A checkpoint whose format or architecture is not known; decoded if the format is."""
    try:
        return readable_checkpoint(folder)
    except UnsupportedModel:
        if folder.is_file():
            raise
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
        reports = _reports(checkpoint, dict.fromkeys(names, False))
        shares = [report.sparsity for report in reports]
        yield PartReport(part, len(names), sum(sizes), _mean(sizes, shares))


def _reports(
    checkpoint: Checkpoint, transposed: Mapping[str, bool], pruned: Checkpoint | None = None
) -> tuple[TensorReport, ...]:
    """What each tensor holds, by whether it lies `[in, out]`; decoded ones one after the other."""
    decoded = isinstance(checkpoint, DecodedCheckpoint) or isinstance(pruned, DecodedCheckpoint)
    with ThreadPoolExecutor(1 if decoded else torch.get_num_threads()) as pool:
        report = partial(_report, checkpoint, pruned)
        return tuple(pool.map(report, transposed, transposed.values()))


def _report(
    checkpoint: Checkpoint, pruned: Checkpoint | None, name: str, transposed: bool
) -> TensorReport:
    place = checkpoint.places[name]
    if pruned is not None:
        refuse_other(checkpoint, pruned, name)
    tensor = numbers(checkpoint, name)
    if tensor is None:
        return TensorReport(name, place.shape, place.dtype, None, (), 0, 0, 0)
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
        None if pruned is None else held_against(tensor, numbers(pruned, name)),
    )


def numbers(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """A tensor whose numbers can be counted; None for what is packed in a way that is not read."""
    if (
        not isinstance(checkpoint, DecodedCheckpoint)
        and checkpoint.places[name].dtype not in DTYPES
    ):
        return None
    tensor = checkpoint.tensor(name)
    return tensor if countable(tensor) else None


def countable(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are weights: floats that torch knows."""
    known = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return known or tensor.dtype in FLOAT8


def refuse_other(checkpoint: Checkpoint, pruned: Checkpoint, name: str) -> None:
    """Raise BadCheckpoint where a pruned checkpoint has not the same tensor."""
    shape, place = checkpoint.places[name].shape, pruned.places.get(name)
    if place is None or place.shape != shape:
        found = "no such tensor" if place is None else f"{name} {list(place.shape)}"
        raise BadCheckpoint(
            f"{name} {list(shape)} of {checkpoint.folder} cannot be held against "
            f"{pruned.folder}, which has {found}. Name the checkpoint that it was made of."
        )


def held_against(now: Tensor, before: Tensor | None) -> Against | None:
    """The zeros of a tensor held against those that it had; None where those cannot be counted."""
    if before is None:
        return None
    zero, pruned = is_zero(now), is_zero(before)
    gone = count_zeros(before)
    came_back, vanished = int((pruned & ~zero).sum()), int((zero & ~pruned).sum())
    return Against(gone, came_back, now.numel() - gone, vanished)


def share_in_words(share: float | None) -> str:
    """A share of zeros as people read it."""
    return "unknown" if share is None else f"{share:.2%}"


def rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    """The table: tensor, shape, dtype, sparsity, patterns, odd values; held against a pruned
    checkpoint also the shares that came back and vanished.
    """
    for tensor in inspection.tensors:
        counts = {"-0.0": tensor.negative_zeros, "NaN": tensor.nans, "Inf": tensor.infs}
        held = tensor.against
        yield (
            tensor.name,
            "×".join(map(str, tensor.shape)),
            tensor.dtype,
            share_in_words(tensor.sparsity),
            " ".join(tensor.patterns),
            ", ".join(f"{count} {what}" for what, count in counts.items() if count),
            *(() if inspection.against is None else shares_in_words(held)),
        )


def shares_in_words(against: Against | None) -> tuple[str, str]:
    """Which shares of the pruned weights came back, and of the kept ones vanished."""
    if against is None:
        return "unknown", "unknown"
    return (
        f"{against.came_back / max(against.pruned, 1):.2%}",
        f"{against.vanished / max(against.kept, 1):.2%}",
    )
