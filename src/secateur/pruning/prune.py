"""The program: a model and some text in, a pruned checkpoint and a record of what was done out.

    tokens → hidden states entering block i → statistics per weight matrix → (weight, kept) of each
           → the block's bytes in the result → hidden states entering block i+1 → …

`prune` is the whole of it on disk: the loop `pruned_blocks`, and a writer of finished blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur.checkpoints.copied import left_behind_in_words
from secateur.checkpoints.output_folder import refuse_output
from secateur.checkpoints.record import Report, pruning_record, read_from
from secateur.data.bos import readable
from secateur.errors import UnsupportedModel
from secateur.models.stream.block_writer import block_writer
from secateur.models.stream.blocks import stream
from secateur.models.stream.distributed import ALONE, Ranks, joined
from secateur.pruning.block import PrunedBlock, prune_block
from secateur.pruning.check import Zeros, find_recipe
from secateur.pruning.distil import as_it_is_run, distil_result, refusal
from secateur.pruning.opening import Opened, opened
from secateur.pruning.own_text import own_file, refuse_ranks
from secateur.pruning.permute import groups_by_kind
from secateur.pruning.planning.passes import needs_dense
from secateur.pruning.prepare import Pruning, block_run, conditions_of, prepare
from secateur.pruning.structured.method import Slices
from secateur.pruning.structured.program import prune_structure
from secateur.system.devices import Resources, find_resources
from secateur.system.memory import PeakMemory
from secateur.system.progress import Progress
from secateur.system.settings import (
    CalibrationText,
    Compute,
    Destination,
    Recipe,
    Trust,
    Unpacking,
    taken,
)


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    allocate: str = Recipe.allocate,
    values: str = Recipe.values,
    align: int | None = Recipe.align,
    calibration: str | None = CalibrationText.calibration,
    samples: int = CalibrationText.samples,
    seq_len: int | None = CalibrationText.seq_len,
    seed: int = CalibrationText.seed,
    skip: Sequence[str] = Recipe.skip,
    keep_zeros: bool = Recipe.keep_zeros,
    draft_heads: str = Recipe.draft_heads,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    data_dir: str | Path | None = CalibrationText.data_dir,
    bos: str = CalibrationText.bos,
    calibration_on: str = CalibrationText.calibration_on,
    self_temperature: float = CalibrationText.self_temperature,
    self_tokens: int = CalibrationText.self_tokens,
    overwrite: bool = Destination.overwrite,
    restart: bool = Destination.restart,
    result_dtype: str = Unpacking.result_dtype,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune a model and write the result to the folder `out`; returns the report of the run.

    The options are those of the command, whose help says what each is (`system.settings`); `model`
    None is the embedded demo model. Statistics and solving are float32 whatever the `dtype` of the
    forward passes, and the result has the dtype of the source, or `result_dtype` where that is
    quantised. A run that was killed goes on after its last finished block when it is started again
    with the same arguments. Raises SecateurError in all its kinds; then `out` is untouched.
    """
    given = locals()
    text, compute = readable(taken(CalibrationText, given)), taken(Compute, given)
    destination, trust = taken(Destination, given), taken(Trust, given)
    # Whatever can be refused is refused before the model is touched.
    chosen = find_recipe(taken(Recipe, given))
    refuse_output(Path(out), overwrite=overwrite)
    with joined(device) as (ranks, device):
        resources = find_resources(replace(compute, device=device))
        progress = (progress if ranks.first else None) or Progress()
        refuse_ranks(text, ranks.size)
        where = {"destination": destination, "progress": progress, "result_dtype": result_dtype}
        source = opened(model, text, resources, trust, **where)
        report = prune_checkpoint(source, chosen, resources, destination, trust, progress, ranks)
    own_file(Path(out)).unlink(missing_ok=True)
    progress.end()
    return report


def prune_checkpoint(
    opened: Opened,
    chosen: Zeros | Slices,
    resources: Resources,
    destination: Destination,
    trust: Trust,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """`prune` for a model that is loaded already, and calibration windows that are drawn already.

    A structure makes a smaller model, in another program; from there on there are zeros only.
    """
    progress, (source, language_model, windows) = progress or Progress(), opened
    if isinstance(chosen, Slices):
        if ranks.size > 1:
            raise UnsupportedModel(
                f"{chosen.structure} is taken out in one process; found {ranks.size}."
            )
        return prune_structure(opened, chosen, resources, destination, trust, progress)
    out = Path(destination.out)
    run = block_run(language_model, windows, resources, out.resolve().parent, progress, ranks)
    refused = refusal(run, chosen.method, resources.limit, out.resolve(), others=source.bytes)
    conditions, count = conditions_of(run, windows, chosen, resources), len(language_model.blocks)
    writing = block_writer(source, language_model, destination, trust, conditions, ranks)
    with PeakMemory() as peak, writing as writer:
        run_as, without = as_it_is_run(chosen.method, refused, writer.once)
        chosen = chosen._replace(method=run_as)
        report, pruning = prepare(run, windows, chosen, resources, trust, writer.once)
        report.remark(without)
        report.remark(read_from(source.folder))
        report.remark(left_behind_in_words(source))
        for entry in writer.entries:
            report.take(entry)
        if len(writer.entries) < count:
            for block in pruned_blocks(pruning, writer.finished()):
                entry = block.entry(language_model.block_name(block.index))
                report.take(entry)
                writer.commit(block.tensors, entry, last=block.index == count - 1)
        if pruning.method.distil:
            distil_result(pruning, writer, report, resources.limit)
        report.end(peak.bytes)
        report.out = out
        options = {"dtype": conditions["dtype"], "batch_size": pruning.run.batch_size}
        options |= {"skip": list(chosen.recipe.skip), "passes": pruning.passes}
        options |= {"keep_zeros": True} if pruning.keep_zeros else {}
        made = source.folder, report, windows.record(), destination.command, options
        writer.finish(pruning_record(*made))
    return report


def pruned_blocks(pruning: Pruning, finished: Sequence[nn.Module] = ()) -> Iterator[PrunedBlock]:
    """Prune every block in order, and give it; the first may be `finished`, and are not given."""
    run, method = pruning.run, pruning.method
    count, classes = len(run.language_model.blocks), groups_by_kind(run)
    if not method.need and not method.refine:  # enough for the probe on which errors are measured
        run = run.first_batch()
    for step in stream(run, dense=needs_dense(method), finished=finished):
        run.progress.advance(f"{step.name} inputs", step.index, count)
        block = prune_block(step, pruning, classes(step) if method.permute else {})
        del step  # with its copy of the block: the next is made before the name is used again
        yield block
        block.tensors.clear()
    run.progress.advance("done", count, count)
