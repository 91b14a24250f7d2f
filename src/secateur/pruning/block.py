"""One block: statistics of its inputs, then the method, weight matrix by weight matrix.

Two copies of the block are changed alike: one in the dtype of the forward passes, which go on
through it, and one as it is stored, which is the result. What is pruned is the stored weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.record import (
    LEFT_OUT,
    UNSEEN,
    UNSEEN_ROUNDED,
    MatrixReport,
    output_error,
    zeros_in_source,
)
from secateur.methods.keep_zeros import prune_keeping_zeros
from secateur.methods.patterns import Pattern, Unstructured
from secateur.methods.statistics import Stats
from secateur.methods.together import prune_together, solved_together
from secateur.methods.values import nearest_codes
from secateur.models.matrices import WeightMatrix, put, refuse_non_finite_weights, weight_matrices
from secateur.models.replay import working_copy
from secateur.models.stream.blocks import Step
from secateur.models.stream.observe import CalibrationStatistics
from secateur.models.stream.refine import Tuned, refine_block
from secateur.pruning.permute import Classes, Permutation
from secateur.pruning.prepare import Pruning
from secateur.system.memory import release_memory
from secateur.system.tensors import count_zeros

NOTHING = Unstructured(0.0)
"""The pattern of what is rounded and keeps every weight."""


@dataclass
class PrunedBlock:
    """A finished block: the parameters that changed, by name in the model, as they are stored."""

    index: int
    tensors: dict[str, Tensor]
    reports: list[MatrixReport]
    tuned: Tuned | None = None

    def entry(self, name: str) -> dict[str, Any]:
        """What `Report.take` takes, as JSON can hold it."""
        matrices = [asdict(report) for report in self.reports]
        return {"block": name, "sites": matrices, "refined": self.tuned}


@dataclass
class _Work:
    """A block while it is pruned: its matrices as they were (`dense`) and as they will be stored.

    Of those that were pruned a note, with values on a grid how many weights the mask keeps, and
    inputs `[tokens, in]` to measure errors on.
    """

    step: Step
    pruning: Pruning
    dense: Mapping[str, WeightMatrix]
    targets: Mapping[str, WeightMatrix]
    permutation: Permutation | None
    notes: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)

    def pattern(self, name: str) -> Pattern | None:
        """The pattern that a weight matrix gets, None where it is left out."""
        return self.pruning.plan.get(f"{self.step.name}.{name}")


@torch.no_grad()
def prune_block(step: Step, pruning: Pruning, classes: Mapping[str, Classes]) -> PrunedBlock:
    """Prune the weight matrices of one block after the plan. Raises NonFinite.

    `classes` are the channels that may change places, by the matrix that reads them; only for a
    method that permutes. Every one of several ranks solves its share of the matrices.
    """
    method, run = pruning.method, pruning.run
    original, cpu = run.language_model.blocks[step.index], torch.device("cpu")
    result, permutation = working_copy(original, cpu, None), None
    if classes:
        original = working_copy(original, cpu, None)  # will be permuted as well
        permutation = Permutation(step, (step.block, result, original), classes)
    dense, targets = weight_matrices(original), weight_matrices(result)
    work = _Work(step, pruning, dense, targets, permutation)
    refuse_non_finite_weights(step.name, dense)
    stages = step.stages(
        method.need,
        {name for name in step.matrices if work.pattern(name)},
        one_pass=pruning.passes == "one" and not method.permute,
        sequential=method.sequential,
        again=method.refine > 0,
    )
    for group, observed in stages:
        work.probes |= observed.probes
        with run.seconds.counted("solve"):
            solve = partial(_solve, work, run.ranks.mine(group), observed)
            for notes, kept in run.ranks.together(solve):
                work.notes |= notes
                work.kept |= kept
            _hand_round(work, group)
    release_memory()
    changed = sorted({step.matrices[name].parameter for name in work.notes})
    tuned = None
    if method.refine and changed:
        _advance(work, f"{step.name} as a whole")
        tuned = refine_block(step, result, changed, work.notes, method, pruning.values)
    written = {*changed, *(permutation.moved if permutation else ())}
    tensors = {f"{step.name}.{n}": result.get_parameter(n).data for n in sorted(written)}
    return PrunedBlock(step.index, tensors, [_report(work, name) for name in step.matrices], tuned)


def _solve(
    work: _Work, group: Sequence[str], observed: CalibrationStatistics
) -> tuple[dict[str, str], dict[str, int]]:
    """Prune the matrices of a group in both copies; a note on each that was, and what it keeps."""
    step, method = work.step, work.pruning.method
    notes, kept = dict[str, str](), dict[str, int]()
    for names in solved_together(method, group, observed.stats):
        stats = observed.stats.get(names[0], Stats(0, {}))
        if method.need and not stats.tokens:
            notes |= _round_unseen(work, names)
            continue
        _advance(work, f"{step.name}.{names[0]}")
        patterns = [pattern for name in names if (pattern := work.pattern(name))]
        note = ""
        if work.permutation and len(names) == 1:
            name = names[0]
            score = partial(method.score, work.dense[name].weight.float())
            stats, note = work.permutation.apply(name, score, stats, patterns[0], work.probes)
        weights = [work.dense[n].weight.to(step.device).to(torch.float32, copy=True) for n in names]
        solve = prune_keeping_zeros if work.pruning.keep_zeros else prune_together
        solved = solve(method, weights, stats, patterns)
        for name, pruned in zip(names, solved, strict=True):
            put(f"{step.name}.{name}", pruned.weight, (work.targets[name], step.matrices[name]))
            notes[name] = ", ".join(filter(None, (note, pruned.note)))
            if work.pruning.values is not None:
                kept[name] = int(pruned.kept.sum())
    return notes, kept


def _round_unseen(work: _Work, names: Sequence[str]) -> dict[str, str]:
    """Give experts without tokens the nearest of the values that are wanted; a note on each.

    They lose no weight, since nothing tells which, but all experts of a checkpoint are of one kind.
    """
    values, notes = work.pruning.values, dict[str, str]()
    if values is None:
        return notes
    for name in names:
        if work.pattern(name) and work.targets[name].expert:
            codes = nearest_codes(work.dense[name].weight.to(work.step.device), values)
            copies = (work.targets[name], work.step.matrices[name])
            put(f"{work.step.name}.{name}", codes.dense(), copies)
            notes[name] = UNSEEN_ROUNDED
    return notes


def _hand_round(work: _Work, group: Sequence[str]) -> None:
    """Give every rank what the others have solved."""
    ranks = work.pruning.run.ranks
    if ranks.size == 1:
        return
    for position, name in enumerate(group):
        if name in work.notes:
            stored = ranks.hand_round(work.targets[name].stored, position % ranks.size)
            for copy in (work.targets, work.step.matrices):
                copy[name].stored.copy_(stored)


def _report(work: _Work, name: str) -> MatrixReport:
    """What became of a weight matrix."""
    matrix, pattern, error = work.targets[name], work.pattern(name), None
    rows, columns = matrix.weight.shape
    if (note := work.notes.get(name)) is None:
        pattern, note = None, UNSEEN if pattern else LEFT_OUT
    elif note == UNSEEN_ROUNDED:
        pattern = NOTHING
    elif (probe := work.probes.get(name)) is not None:
        before, after = (m.weight.to(probe.device).float() for m in (work.dense[name], matrix))
        error = output_error(probe, before - after, before)
    short, name = name, f"{work.step.name}.{name}"
    shown = None if pattern is None else str(pattern)
    count = count_zeros(matrix.weight)
    share = count / (rows * columns)
    vanished = work.kept[short] - (rows * columns - count) if short in work.kept else 0
    zeros = zeros_in_source(work.dense[short].weight, matrix.weight)
    return MatrixReport(name, (rows, columns), shown, share, error, note, *zeros, vanished)


def _advance(work: _Work, what: str) -> None:
    run = work.pruning.run
    run.progress.advance(what, work.step.index, len(run.language_model.blocks))
