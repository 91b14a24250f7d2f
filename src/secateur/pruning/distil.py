"""The last stage of a method that distils: all blocks are pruned, and are tuned together.

    what the dense model makes of the calibration windows → the steps of models/stream/distil.py,
    the state of which is written now and then → every block once more, rounded as it is stored

Unlike all before it, it holds every block at once, in float32, with Adam's two means. So whether
there is room is asked before any work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.checkpoints.record import MatrixReport
from secateur.errors import Interrupted
from secateur.models.kept import block_masks, keep_masks
from secateur.models.matrices import weight_matrices
from secateur.models.replay import working_copy
from secateur.models.stream.block_writer import BlockWriter
from secateur.models.stream.distil import Aims, Distillation, Distilled, aims, epochs_of
from secateur.models.stream.straight_through import grids_of
from secateur.pruning.prepare import Pruning
from secateur.system.files import disk_errors, sync
from secateur.system.memory import anonymous_bytes, available_bytes, freed_memory_kept

STATE, END = ".distil.safetensors", ".distilled.safetensors"
"""Files in a result that is not finished: from which a run that died goes on, and what came out."""
SAVE_SECONDS = 300.0
JUDGED, DISTILLED = "judged", "distilled"


def distil_model(
    pruning: Pruning, found: Aims, reports: Sequence[MatrixReport], limit: int | None
) -> Distilled:
    """Tune a model in memory, in place, all of whose blocks are pruned."""
    blocks = pruning.run.language_model.blocks
    distillation = distillation_of(pruning, found, blocks, reports, limit)
    before = distillation.judge()
    _steps(pruning, distillation)
    after = distillation.judge()
    distillation.end()
    if after < before:
        for name, tensor in _rounded(pruning, blocks, distillation):
            pruning.run.language_model.model.get_parameter(name).data.copy_(tensor)
    return Distilled(before, min(after, before))


def distil_result(
    pruning: Pruning, writer: BlockWriter, reports: Sequence[MatrixReport], limit: int | None
) -> Distilled:
    """Tune the result that a writer holds, all of whose blocks are finished, and write it again.

    Raises Interrupted, DiskFull; the same command goes on.
    """
    found, end = writer.recorded(DISTILLED), writer.folder / END
    if not found:
        stored = writer.finished()
        distillation = distillation_of(pruning, aims(pruning.run), stored, reports, limit)
        before = writer.once(JUDGED, distillation.judge)
        _tune(pruning, distillation, writer)
        after = distillation.judge()
        distillation.end()
        if after < before:
            _save(end, dict(_rounded(pruning, stored, distillation)))
        found = [writer.once(DISTILLED, lambda: (before, min(after, before)))]
    if end.exists():
        writer.rewrite(load_file(end))
        end.unlink()
    (writer.folder / STATE).unlink(missing_ok=True)
    return Distilled(*found[0])


def _tune(pruning: Pruning, distillation: Distillation, writer: BlockWriter) -> None:
    """Take the steps that are left, and keep now and then what is needed to go on from there."""
    state, saved = writer.folder / STATE, perf_counter()
    if state.exists():
        distillation.restore(load_file(state))

    def save() -> None:
        nonlocal saved
        last = distillation.done == distillation.steps
        if last or writer.stopping or perf_counter() - saved > SAVE_SECONDS:
            _save(state, distillation.state())
            saved = perf_counter()
        if writer.stopping and not last:
            raise Interrupted(f"Stopped after step {distillation.done} of {distillation.steps}.")

    _steps(pruning, distillation, save)


def distillation_of(
    pruning: Pruning,
    found: Aims,
    stored: Sequence[nn.Module],
    reports: Sequence[MatrixReport],
    limit: int | None,
) -> Distillation:
    """The tuning of blocks as they are `stored`: of the parameters that hold what was pruned."""
    run, device = pruning.run, pruning.run.devices[0]
    pruned = {report.site for report in reports if report.pattern is not None}
    blocks, kept, grids = [], list[Mapping[str, Tensor]](), []
    for index, block in enumerate(stored):
        start = run.language_model.block_name(index)
        sites = weight_matrices(block).values()
        names = {one.parameter for one in sites if f"{start}.{one.name}" in pruned}
        copy = working_copy(block, device, torch.float32)
        masks = {name: mask for name, mask in block_masks(copy).items() if name in names}
        grids.append(grids_of(block, masks, pruning.values) if pruning.values else {})
        blocks.append(copy)
        kept.append(masks)
    free = available_bytes(device) if limit is None else limit - (anonymous_bytes() or 0)
    means = 8 * sum(mask.numel() for masks in kept for mask in masks.values())
    room = max(free - means, 0) // 2
    epochs = epochs_of(pruning.method.distil, *run.tokens.shape)
    return Distillation(found, blocks, kept, epochs=epochs, grids=grids, room=room)


def _steps(
    pruning: Pruning, distillation: Distillation, after_each: Callable[[], None] = lambda: None
) -> None:
    progress = pruning.run.progress
    progress.begin("tuning all blocks towards the dense model's predictions")
    with pruning.run.seconds.counted("refine"), freed_memory_kept():
        for loss in distillation.run():
            after_each()
            progress.advance(f"KL {loss:.4f}", distillation.done, distillation.steps)


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state, whole or not at all."""
    partial = file.with_suffix(".partial")
    with disk_errors(file):
        save_file(dict(tensors), partial)
        sync(partial)
        partial.replace(file)
        sync(file.parent)


def _rounded(
    pruning: Pruning, stored: Sequence[nn.Module], distillation: Distillation
) -> Iterator[tuple[str, Tensor]]:
    """The tuned parameters of all blocks by their name in the model, rounded as they are stored."""
    blocks = zip(stored, distillation.blocks, distillation.kept, strict=True)
    for index, (before, tuned, kept) in enumerate(blocks):
        keep_masks(tuned, before, kept)
        name = pruning.run.language_model.block_name(index)
        for one in kept:
            dtype = before.get_parameter(one).dtype
            yield f"{name}.{one}", tuned.get_parameter(one).detach().to("cpu", dtype).contiguous()
