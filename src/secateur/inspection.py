"""What a checkpoint folder really holds: read from its tensors, one at a time, whoever wrote it.

The model is built without memory for its weights, to learn which parameters are sites and which way they lie;
the numbers come from the shards. A folder whose architecture transformers does not know is read as well: then
every matrix counts, and coverage is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.checkpoint import RECORD, Checkpoint, open_checkpoint, resolve
from secateur.errors import BadCheckpoint, UnsupportedModel, in_one_line
from secateur.files import fits, read_json
from secateur.model import checkpoint_tensors, find_stack, load_config
from secateur.patterns import NM
from secateur.refusals import LOAD_ERRORS, foreign, without_weights
from secateur.replay import LanguageModel
from secateur.sites import sites

PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16))
"""The N:M patterns that are looked for, with those that `pruning.json` names."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the checkpoint that is a site, or several. `patterns` are the N:M patterns it satisfies."""

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
    """What `inspect` returns. `coverage` is the share of block weights that are sites, None where unknown."""

    folder: str
    sparsity: float
    coverage: float | None
    tensors: tuple[TensorReport, ...]
    record: dict[str, Any] | None


def inspect(model: str | Path | None = None, *, trust_remote_code: bool = False) -> Inspection:
    """The realised sparsity and patterns of every site of a checkpoint folder. Raises BadCheckpoint."""
    folder = resolve(model)
    checkpoint = open_checkpoint(folder)
    try:
        stored, coverage = stored_sites(checkpoint, trust_remote_code=trust_remote_code)
    except UnsupportedModel:
        stored, coverage = unknown_sites(checkpoint), None
    reports = [_read(checkpoint, name, held.transposed) for name, held in stored.items()]
    sizes = [torch.Size(report.shape).numel() for report in reports]
    zeros = sum(size * report.sparsity for size, report in zip(sizes, reports, strict=True))
    return Inspection(str(folder), zeros / max(sum(sizes), 1), coverage, tuple(reports), record_of(folder))


class Stored(NamedTuple):
    """What the model knows of a tensor of the checkpoint: its parameter, whether it lies `[in, out]`, and whether it
    holds experts.
    """

    parameter: str
    transposed: bool
    expert: bool


def stored_sites(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> tuple[dict[str, Stored], float]:
    """The tensors of a checkpoint that are sites, or several, by name; and the coverage. Raises UnsupportedModel."""
    config = load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    try:
        model = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(f"{checkpoint.folder} describes no causal LM: {in_one_line(error)}.") from error
    language_model = LanguageModel(model, find_stack(model), ())
    found: dict[str, Stored] = {}
    covered = total = 0
    for index, block in enumerate(language_model.blocks):
        total += sum(p.numel() for p in block.parameters() if p.dim() > 1)
        parameters: dict[str, Stored] = {}
        for site in sites(block).values():
            covered += site.stored.numel()
            name = f"{language_model.block_name(index)}.{site.parameter}"
            parameters[name] = Stored(name, site.transposed, site.expert)
        for name, held in parameters.items():
            parameter = {name: model.get_parameter(name).data}
            for stored, tensor in checkpoint_tensors(language_model, parameter, checkpoint.places).items():
                if (shape := checkpoint.places[stored].shape) != tuple(tensor.shape):
                    raise foreign(checkpoint.folder, f"{stored} is {list(shape)}, not {list(tensor.shape)}")
                found[stored] = held
    return found, covered / max(total, 1)


def unknown_sites(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every matrix, taken for a linear layer: for an architecture that transformers does not know."""
    matrices = (name for name, place in checkpoint.places.items() if len(place.shape) > 1)
    return {name: Stored(name, transposed=False, expert=False) for name in matrices}


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


def record_of(folder: Path) -> dict[str, Any] | None:
    """The folder's own pruning.json, or None. Raises BadCheckpoint where it is none, or says what nobody can read."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        held = read_json(file, finite=True)
    except ValueError as error:
        raise BadCheckpoint(f"{file} is no JSON ({in_one_line(error)}). Delete it, or prune again.") from error
    if not isinstance(held, dict):
        raise BadCheckpoint(f"{file} holds a {type(held).__name__}; an object was wanted. Delete it, or prune again.")
    odd = [(field, held[field]) for field, wanted in _RECORD.items() if not fits(held.get(field), wanted | None)]
    sites = held.get("sites") or [] if not odd else []
    odd += [("a site", site) for site in sites if not fits(site.get("site"), str)]
    odd += [("a site", site) for site in sites if not fits(site.get("pattern"), str | None)]
    for what, value in odd[:1]:
        said = f"{file} is no record of a pruning run: {what} is {str(value)[:80]!r}."
        raise BadCheckpoint(f"{said} Delete it, or prune again.")
    return held


_RECORD = {"method": str, "pattern": str, "sites": list[dict[str, Any]], "parameters": tuple[int, int],
           "removed": dict[str, str]}  # fmt: skip
"""What is read of pruning.json."""


def rows(found: Inspection) -> Iterator[tuple[str, ...]]:
    """The lines of the table that the command prints."""
    for tensor in found.tensors:
        odd = [f"{count} {what}" for count, what in (
            (tensor.negative_zeros, "-0.0"), (tensor.nans, "NaN"), (tensor.infs, "Inf"),
        ) if count]  # fmt: skip
        shape = "×".join(map(str, tensor.shape))
        yield (
            tensor.name,
            shape,
            tensor.dtype,
            f"{tensor.sparsity:.2%}",
            " ".join(tensor.patterns),
            ", ".join(odd),
        )
