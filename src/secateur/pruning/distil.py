"""The last stage of a method that distils: all blocks are pruned, and are tuned together.

    what the dense model makes of the calibration windows → the steps of models/stream/distil.py,
    the state of which is written now and then → every block once more, rounded as it is stored

Unlike all before it, it holds every block at once, in float32, with Adam's two means: in memory,
or on a CPU where that is short in a mapped file, with the same numbers. Whether there is room is
asked before any work.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.checkpoints.record import Report
from secateur.checkpoints.result_folder import refuse_full
from secateur.checkpoints.shards import save
from secateur.errors import DiskFull, Interrupted, NotEnoughText, SecateurError, UnsupportedModel
from secateur.methods.base import Method
from secateur.models.kept import keep_masks, kept_of
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import weight_matrices
from secateur.models.replay import working_copy
from secateur.models.stream.block_writer import BlockWriter
from secateur.models.stream.distil import Aims, Distillation, aims, refuse_shared, text_of
from secateur.models.stream.forward import BlockRun
from secateur.models.stream.straight_through import grids_of
from secateur.pruning.planning.memory import free_bytes, tuned_bytes, tuned_in_file
from secateur.pruning.prepare import Pruning
from secateur.system.files import disk_errors, sync
from secateur.system.memory import freed_memory_kept
from secateur.system.tensors import count_zeros

STATE, END = ".distil.safetensors", ".distilled.safetensors"
"""Files in a result that is not finished: from which a run that died goes on, and what came out."""
SAVE_SECONDS = 300.0
IN_FILE = 1.5
"""What goes to the mapped file, in states: masks and what comes out too."""
LEFT_OUT, JUDGED, DISTILLED = "left out", "judged", "distilled"


class Outcome(NamedTuple):
    """KL(dense ‖ pruned) on the windows held back before and after, None where it is no number, and
    how many of all steps were taken; `zeros` of the matrices in blocks that are on a grid, where
    weights may have come to the level 0.
    """

    before: float | None
    after: float | None
    done: int
    steps: int
    zeros: Mapping[str, int] | None = None

    @property
    def better(self) -> bool:
        return self.before is not None and self.after is not None and self.after < self.before

    def into(self, report: Report) -> None:
        """What the report says of it. Errors of matrices are those of other weights now."""
        zeros = self.zeros or {}
        if self.better:
            report.sites = [
                one if one.pattern is None else one.tuned(zeros.get(one.site))
                for one in report.sites
            ]
        if self.before is not None:
            after = self.before if self.after is None else min(self.after, self.before)
            report.distilled = self.before, after
        if None in (self.before, self.after) or self.done < self.steps:
            report.remark(
                f"The loss of +distil was no number after {self.done} of {self.steps} steps; "
                "the model is what it was before them, unless it had come nearer."
            )


def refusal(
    run: BlockRun, method: Method, limit: int | None, out: Path, *, others: int = 0, states: int = 2
) -> SecateurError | None:
    """Why a method does without tuning all blocks, None where it tunes them or never does.

    On the disk of `out` go `others`, bytes; so many `states` of a run that may die; and all blocks
    where they are more than memory holds. Raises NotEnoughText, UnsupportedModel or DiskFull for a
    method that does not do without.
    """
    if not method.distil:
        return None
    try:
        text_of(run)
        in_file = tuned_in_file(run.language_model, run.devices[0], limit)
        refuse_shared(run)
        written = (states + IN_FILE * in_file) * tuned_bytes(run.language_model)
        refuse_full(out, others + int(written))
    except (NotEnoughText, UnsupportedModel, DiskFull) as error:
        if not method.distil_if_it_fits:
            raise
        return error
    return None


def as_it_is_run(
    method: Method, refused: SecateurError | None, once: Callable[[str, Callable[[], Any]], Any]
) -> tuple[Method, str]:
    """The method without its tuning where that is `refused`, and what the report says of it.

    Whoever goes on with a run does as it began; raises the refusal where that cannot be.
    """
    if not method.distil:
        return method, ""
    [said] = once(LEFT_OUT, lambda: [refused and str(refused)])
    if said is None:
        if refused:
            raise refused
        return method, ""
    return method._replace(distil=0), f"All blocks were not tuned together. {said}"


def spill_of(run: BlockRun, folder: Path, limit: int | None) -> Path | None:
    """The `folder` where all blocks are more than memory holds, and go to a file there; on a device
    that maps no files they fit, or were refused.
    """
    device = run.devices[0]
    in_file = device.type == "cpu" and tuned_in_file(run.language_model, device, limit)
    return folder if in_file else None


def distil_model(
    pruning: Pruning, found: Aims, report: Report, limit: int | None, spill: Path | None
) -> None:
    """Tune a model in memory, in place, all of whose blocks are pruned."""
    model = pruning.run.language_model
    distillation = _distillation(pruning, found, model.blocks, report, limit, spill)
    outcome, tensors = _tuned(pruning, distillation, model.blocks, _number(distillation.judge()))
    for name, tensor in tensors.items():
        model.model.get_parameter(name).data.copy_(tensor)
    outcome.into(report)


def distil_result(pruning: Pruning, writer: BlockWriter, report: Report, limit: int | None) -> None:
    """Tune the result that a writer holds, all of whose blocks are finished, and write it again.

    Raises Interrupted, DiskFull; the same command goes on.
    """
    recorded, end = writer.recorded(DISTILLED), writer.folder / END
    if not recorded:
        stored, spill = writer.finished(), spill_of(pruning.run, writer.folder, limit)
        found = aims(pruning.run, pruning.method.distil, spill)
        distillation = _distillation(pruning, found, stored, report, limit, spill)
        [before] = writer.once(JUDGED, lambda: [_number(distillation.judge())])
        each = _keeping(distillation, writer)
        outcome, tensors = _tuned(pruning, distillation, stored, before, each)
        if tensors:
            _save(end, tensors)
        recorded = [writer.once(DISTILLED, lambda: outcome)]
    outcome = Outcome(*recorded[0])
    if outcome.better and end.exists():
        writer.rewrite(load_file(end))
    for file in (end, writer.folder / STATE):
        file.unlink(missing_ok=True)
        file.with_suffix(".partial").unlink(missing_ok=True)
    outcome.into(report)


def _distillation(
    pruning: Pruning,
    found: Aims,
    stored: Sequence[nn.Module],
    report: Report,
    limit: int | None,
    spill: Path | None,
) -> Distillation:
    """The tuning of blocks as they are `stored`: of the parameters that hold what was pruned. They
    lie in a file in the folder `spill`, if there is one.
    """
    run, device = pruning.run, pruning.run.devices[0]
    pruned = {one.site for one in report.sites if one.pattern is not None}
    blocks, kept, grids = [], list[Mapping[str, Tensor]](), []
    placed = HiddenStateStore(spill).placed
    for index, block in enumerate(stored):
        start, sites = run.language_model.block_name(index), weight_matrices(block).values()
        here = {one.name: one.parameter for one in sites if f"{start}.{one.name}" in pruned}
        copy = working_copy(block, device, torch.float32)
        for parameter in copy.parameters():
            parameter.data = placed(parameter.data)
        masks = kept_of(copy, sorted(set(here.values())), here)
        masks = {name: placed(mask) for name, mask in masks.items()}
        grids.append(grids_of(block, masks, pruning.values) if pruning.values else {})
        blocks.append(copy)
        kept.append(masks)
    means = 8 * sum(mask.numel() for masks in kept for mask in masks.values())
    room = max(free_bytes(device, limit) - means, 0) // 2
    return Distillation(found, blocks, kept, grids=grids, room=room, placed=placed)


def _tuned(
    pruning: Pruning,
    distillation: Distillation,
    stored: Sequence[nn.Module],
    before: float | None,
    after_each: Callable[[], None] = lambda: None,
) -> tuple[Outcome, dict[str, Tensor]]:
    """What tuning comes to, and the parameters of all blocks by their name in the model, rounded as
    they are `stored`; none where they are no better.
    """
    progress, steps = pruning.run.progress, distillation.steps
    if before is None:
        return Outcome(None, None, 0, steps), {}
    progress.begin("tuning all blocks towards the dense model's predictions")
    with pruning.run.seconds.counted("refine"), freed_memory_kept():
        for loss in distillation.run():
            after_each()
            progress.advance(f"KL {loss:.4f}", distillation.done, steps)
        distillation.end()
        tensors, zeros = dict[str, Tensor](), dict[str, int]()
        for index, block in enumerate(stored):
            tuned, kept = distillation.blocks[index], distillation.kept[index]
            keep_masks(tuned, block, kept, grids := distillation.grids[index])
            name = pruning.run.language_model.block_name(index)
            if grids:
                sites = weight_matrices(tuned)
                zeros |= {f"{name}.{one}": count_zeros(m.weight) for one, m in sites.items()}
            for one in kept:
                weight, dtype = tuned.get_parameter(one).detach(), block.get_parameter(one).dtype
                stored_as = weight.to("cpu", dtype).contiguous()
                tensors[f"{name}.{one}"] = distillation.placed(stored_as)
        after, done = _number(distillation.judge()), distillation.done
        outcome = Outcome(before, after, done, steps, zeros)
    return outcome, tensors if outcome.better else {}


def _number(figure: float) -> float | None:
    """A figure as JSON can hold it."""
    return figure if isfinite(figure) else None


def _keeping(distillation: Distillation, writer: BlockWriter) -> Callable[[], None]:
    """Take up what a run that died has kept; what to call after each step to keep it."""
    state, saved = writer.folder / STATE, perf_counter()
    if state.exists():
        distillation.restore(load_file(state))

    def keep() -> None:
        nonlocal saved
        last, stopping = distillation.done == distillation.steps, writer.stopping
        if last or stopping or perf_counter() - saved > SAVE_SECONDS:
            _save(state, distillation.state())
            saved = perf_counter()
        if stopping and not last:
            raise Interrupted(
                f"Stopped after step {distillation.done} of {distillation.steps} of +distil, which "
                "is kept."
            )

    return keep


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole or not at all."""
    partial = file.with_suffix(".partial")
    with disk_errors(file):
        save(dict(tensors), partial)
        sync(partial)
        partial.replace(file)
        sync(file.parent)
