"""Will a runtime use the zeros of a checkpoint? Asked of every weight matrix before deployment.

Zeros alone make nothing faster: most runtimes multiply by them, and those that skip some want a
pattern, a dtype, multiples of something and enough rows of x, and fall back to dense products
without a word. The rules are in sparsity_support.py; here the checkpoint is read, and what it
promises (`pruning.json`, else the zeros that are there) is held against them. A quantised one says
nothing of pruning, and its zeros may be gone: held `against` the pruned one, it is that one's
promise that counts. Nothing is run: a yes is no speed, `bench` measures that.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, readable_checkpoint
from secateur.checkpoints.record import record_of
from secateur.deployment.formats.tensorrt_llm import PRUNED, eligible
from secateur.deployment.inspect import Against, countable, held_against, numbers, refuse_other
from secateur.deployment.sparsity_support import (
    CONV1D,
    EXPERTS,
    LINEAR,
    RULES,
    Matrix,
    Rule,
    Verdict,
)
from secateur.errors import BadCheckpoint, UnknownName, UnsupportedModel, in_one_line, printable
from secateur.methods.patterns import TWO_OF_FOUR
from secateur.models.load import locate
from secateur.models.stored import Stored, stored_matrices, unknown_matrices
from secateur.system.settings import Serving, Trust, taken


@dataclass(frozen=True)
class MatrixVerdict:
    """Whether the runtime uses the zeros of one tensor of the checkpoint, and why.

    `shape` is as stored, `promised` the pattern that pruning.json names for it, or the share
    of zeros found; empty where nothing was promised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    promised: str
    used: bool
    reason: str


@dataclass(frozen=True)
class Validation:
    """What `validate` returns.

    `kept` is False where the promised gain will not happen: a matrix was pruned and the runtime
    does not use its zeros, or no matrix was pruned at all. Where the runtime chooses its kernels by
    timing them, True means that nothing stands in the way, and `certain` is False. `source` and
    `date` say where the rule is known from; `notes` hold the command that builds an engine, what
    makes it dense in silence, and figures that others have published.
    """

    folder: str
    runtime: str
    batch: int
    ranks: int
    promised: str
    sites: tuple[MatrixVerdict, ...]
    kept: bool
    certain: bool
    notes: tuple[str, ...]
    source: str
    date: str


@torch.no_grad()
def validate(
    model: str | Path | None = None,
    *,
    runtime: str,
    against: str | Path | None = None,
    batch: int = Serving.batch,
    ranks: int = Serving.ranks,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
) -> Validation:
    """Say for every weight matrix of a checkpoint whether `runtime` will use its zeros, and why.

    `against`: the pruned checkpoint that this one was quantised from, or made of otherwise; then
    its pruning is the promise, and a matrix whose zeros came back breaks it.
    `batch` is how many rows of x a product has: the batch in decoding, times the tokens in prefill.
    `ranks` matters to tensorrt-llm alone, whose checkpoint is split by them. Raises UnknownName and
    BadCheckpoint.
    """
    if runtime not in RULES:
        raise UnknownName("runtime", runtime, RULES)
    rule = RULES[runtime]
    trust = taken(Trust, locals())
    folder = locate(model, trust)
    checkpoint = readable_checkpoint(folder)
    own = replace(trust, revision=None)
    pruned = None if against is None else readable_checkpoint(locate(against, own))
    record = record_of(folder if pruned is None else pruned.folder) or {}
    smaller, notes = record.get("parameters"), rule.remarks(str(folder))
    if smaller:
        became = f"{smaller[0]:,} parameters became {smaller[1]:,}"
        notes = [f"{became}, and every runtime has less to read and add."]
    stored = _stored(checkpoint, trust, notes)
    asked = _Asked(rule, batch, checkpoint, pruned, _patterns(record), bool(smaller))
    lacking, verdicts = {} if smaller else _lacking(rule, checkpoint, stored, ranks), []
    for name, kind in stored.items():
        verdict, count = _site(asked, name, kind)
        if verdict.used and name in lacking:
            verdict = replace(verdict, used=False, reason=lacking[name])
        verdicts.append(verdict)
        if count:
            notes.append(f"{name} holds {count} zeros that are -0.0; add 0 to make them +0.0.")
    counted = [one for one in verdicts if one.promised or smaller]
    if not counted and pruned is None and isinstance(checkpoint, DecodedCheckpoint):
        notes.append(
            f"It is stored as {checkpoint.source.format}: if it was made of a pruned model, the "
            "zeros are gone, and --against that model says how many."
        )
    return Validation(
        folder=str(folder),
        runtime=runtime,
        batch=batch,
        ranks=ranks,
        promised=_promise(record, counted, pruned),
        sites=tuple(verdicts),
        kept=bool(counted) and all(one.used for one in counted),
        certain=bool(smaller) or rule.certain,
        notes=tuple(notes),
        source=rule.source,
        date=rule.date,
    )


def _stored(checkpoint: Checkpoint, trust: Trust, notes: list[str]) -> dict[str, Stored]:
    """The tensors that are weight matrices; every matrix, and a note, where nobody knows."""
    try:
        return stored_matrices(checkpoint, trust_remote_code=trust.trust_remote_code)[0]
    except UnsupportedModel:
        unknown = "transformers does not know this architecture"
        notes.append(f"{unknown}, so every matrix was judged as a linear layer.")
        return unknown_matrices(checkpoint)


class _Asked(NamedTuple):
    """What every matrix is asked: the rule, rows of x, the checkpoint and the pruned one that it
    was made of, if named, the patterns by parameter, and whether what was pruned was cut off.
    """

    rule: Rule
    batch: int
    checkpoint: Checkpoint
    pruned: Checkpoint | None
    patterns: Mapping[str, str]
    smaller: bool


def _site(asked: _Asked, name: str, kind: Stored) -> tuple[MatrixVerdict, int]:
    """The verdict on a tensor, and how many of its zeros are -0.0."""
    tensor = asked.checkpoint.tensor(name)
    matrix, held = _matrix(asked.checkpoint, name, kind, tensor), _held(asked, name, tensor)
    before = matrix.sparsity if held is None else held.pruned / max(held.pruned + held.kept, 1)
    zeros = f"{before:.1%}" if before >= PRUNED else ""
    promised = asked.patterns.get(kind.parameter) or zeros
    used, reason = _verdict(asked.rule, matrix, asked.batch, promised, smaller=asked.smaller)
    if promised and held is not None and held.came_back:
        stored = asked.checkpoint.places[name].dtype
        share = f"{held.came_back / held.pruned:.2%}"
        reason = f"{share} of the zeros that it had came back in {stored}: {reason}"
    shape = asked.checkpoint.places[name].shape
    one = MatrixVerdict(name, shape, matrix.dtype, matrix.sparsity, promised, used, reason)
    return one, matrix.negative_zeros


def _held(asked: _Asked, name: str, tensor: Tensor) -> Against | None:
    """What became of the zeros of a tensor; None where nothing was asked, or cannot be known."""
    if asked.pruned is None:
        return None
    refuse_other(asked.checkpoint, asked.pruned, name)
    return held_against(tensor, numbers(asked.pruned, name)) if countable(tensor) else None


def _matrix(checkpoint: Checkpoint, name: str, stored: Stored, tensor: Tensor) -> Matrix:
    """What the rules want to know of a tensor."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:  # float8 has no arithmetic
        tensor = tensor.float()
    weight = tensor.transpose(-1, -2) if stored.transposed else tensor
    zero = weight == 0
    return Matrix(
        name=name,
        kind=EXPERTS if stored.expert else CONV1D if stored.transposed else LINEAR,
        dtype=checkpoint.places[name].dtype,
        rows=weight.shape[-2],
        columns=weight.shape[-1],
        sparsity=zero.float().mean(dtype=torch.float64).item() if zero.numel() else 0.0,
        crowded=_crowded(weight),
        crowded_outputs=_crowded(weight.transpose(-1, -2)),
        negative_zeros=int((zero & weight.signbit()).sum()),
        not_finite=int((~weight.isfinite()).sum()),
    )


def _crowded(weight: Tensor) -> float:
    """The share of groups of four in rows that keep more than two weights; 1 without groups."""
    if weight.shape[-1] % TWO_OF_FOUR.m or not weight.numel():
        return 1.0
    return TWO_OF_FOUR.crowded(weight).float().mean(dtype=torch.float64).item()


def _lacking(
    rule: Rule, checkpoint: Checkpoint, stored: Mapping[str, Stored], ranks: int
) -> Mapping[str, str]:
    """By tensor, why TensorRT-LLM has no sparse kernel for the layers that it is part of.

    Such a layer is several matrices, split by ranks, which no rule for one matrix sees.
    """
    if rule.name != "tensorrt-llm":
        return {}
    try:
        layers = eligible(checkpoint, ranks=ranks)
    except (BadCheckpoint, UnsupportedModel) as error:
        return dict.fromkeys(stored, in_one_line(error))
    reasons: dict[str, str] = {}
    for layer in layers:
        for name in () if layer.eligible else layer.matrices:
            reason = f"{layer.name} on rank {layer.rank}: {layer.reason}"
            reasons.setdefault(f"{name}.weight", reason)
    return reasons


def _verdict(rule: Rule, matrix: Matrix, rows: int, promised: str, *, smaller: bool) -> Verdict:
    if matrix.not_finite:
        spoilt = f"{matrix.not_finite} of its weights are NaN or Inf"
        return Verdict(False, f"{spoilt}, so the model has no output")
    if smaller:
        return Verdict(True, "what was pruned is gone, so there is nothing to skip")
    if not promised:
        return Verdict(False, "dense: nothing was pruned here")
    if matrix.sparsity < PRUNED:
        zeros = f"{matrix.sparsity:.2%} zeros were found"
        return Verdict(False, f"{promised} was promised; {zeros}")
    return rule.judge(matrix, rows)


def _patterns(record: Mapping[str, Any]) -> dict[str, str]:
    """By parameter, the pattern that pruning.json names for it, or for one of its experts."""
    patterns: dict[str, str] = {}
    for entry in record.get("sites") or []:
        if entry.get("pattern"):
            patterns[f"{entry['site']}.weight"] = entry["pattern"]
            patterns[re.sub(r"\.\d+\.(?=[^.]+$)", ".", entry["site"])] = entry["pattern"]
    return patterns


def _promise(
    record: Mapping[str, Any], counted: list[MatrixVerdict], pruned: Checkpoint | None
) -> str:
    """What the checkpoint promises, in words."""
    whose = "its pruning.json" if pruned is None else f"the pruning.json of {pruned.folder}"
    if record.get("pattern"):
        return f"{record.get('method')} {record['pattern']}, as {whose} says"
    if counted:
        where = "; there is no pruning.json" if pruned is None else f" of {pruned.folder}"
        return f"zeros in {len(counted)} tensors{where}"
    return "nothing: no weight matrix has zeros, and there is no pruning.json"


def rows(validation: Validation) -> Iterator[tuple[str, ...]]:
    """The table: tensor, shape, dtype, sparsity, promised, used, reason."""
    for one in validation.sites:
        shape = "×".join(map(str, one.shape))
        used = "yes" if one.used else "no" if one.promised else "-"
        yield one.name, shape, one.dtype, f"{one.sparsity:.2%}", one.promised, used, one.reason


def summary(validation: Validation) -> list[str]:
    """How many matrices keep their promise, the notes, and where the rule is known from."""
    counted = [one for one in validation.sites if one.promised or one.used]
    used = f"{sum(one.used for one in counted)} of {len(counted)} tensors"
    will = "will" if validation.certain else "may"
    kept = f"with {validation.batch} rows of x: {'kept' if validation.kept else 'not kept'}"
    lines = [
        f"{validation.folder} promises {validation.promised}.",
        f"{validation.runtime} {will} use it in {used} {kept}.",
        *validation.notes,
        f"Known from: {validation.source} ({validation.date}).",
    ]
    return [printable(line) for line in lines]
