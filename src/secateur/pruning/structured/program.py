"""The program for structured pruning: the same stream as `prune`, but what comes out is a smaller
dense model.

    feasibility: what can go, and the stock configuration that holds the rest → which blocks go
    → for each block that stays: statistics → which channels go → least squares on what reads them
    → the block sliced → the block's bytes in the result → hidden states entering the next block → …
    → the written model loaded by a fresh process, its logits compared with those of the stream

Whatever can be refused is refused when feasibility is asked, before any work.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.copied import left_behind_in_words
from secateur.checkpoints.record import Report, pruning_record, read_from
from secateur.checkpoints.result_folder import configure
from secateur.checkpoints.shards import resized, size_of
from secateur.errors import BadPattern, UnsupportedModel
from secateur.methods.structures import NAMES, Depth, Structure, parts
from secateur.models.context import check_windows
from secateur.models.draft_heads import draft_tensors, without_draft_heads
from secateur.models.matrices import coverage, model_coverage
from secateur.models.parts import parts_in_words
from secateur.models.replay import LanguageModel, Shell, run_block, working_copy
from secateur.models.stream.block_writer import BlockWriter, block_writer, with_room
from secateur.models.stream.blocks import BlockRun, stream
from secateur.pruning.opening import Opened
from secateur.pruning.structured.block import BlockSlicer
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.expert_merging import refuse_unknown_neurons
from secateur.pruning.structured.feasibility import Feasibility, Removal, block_parameters
from secateur.pruning.structured.method import Slices, StructuredMethod
from secateur.pruning.structured.names import Names
from secateur.pruning.structured.size_budget import within_budget
from secateur.pruning.structured.slicing import module_of
from secateur.pruning.structured.target_config import path_of_text
from secateur.pruning.structured.verify import refuse_unequal
from secateur.system.devices import Resources, forward_dtype
from secateur.system.machine import versions
from secateur.system.memory import PeakMemory, release_memory
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Recipe, Trust

CHECKED_TOKENS = 256
"""How many tokens of the first window the reloaded model is compared on."""


class Slicing(NamedTuple):
    """A structured run as it has been decided: how, what goes, and what tensors are called."""

    run: BlockRun
    method: StructuredMethod
    removal: Removal
    names: Names


def prune_structure(
    opened: Opened,
    slices: Slices,
    resources: Resources,
    destination: Destination,
    trust: Trust,
    progress: Progress,
    feasibility: Feasibility | None = None,
) -> Report:
    """Write the smaller model of a structure; returns the report that `pruning.json` holds.

    `feasibility`: of this model, where it was asked before, since tracing a block takes long.
    """
    source, language_model, windows = opened
    recipe, method, structure = slices
    devices = resources.devices
    check_windows(language_model, windows, resources.batch_size)
    run = _block_run(opened, resources, progress)
    run = run.by_steps() if method.refine else run
    feasibility = feasibility or Feasibility(language_model, devices[0])
    options = {"dtype": resources.dtype, "batch_size": run.batch_size, "align": recipe.align}
    conditions = {
        "method": recipe.method,
        "pattern": str(structure),
        **options,
        "calibration": windows.fingerprint(),
        "device": devices[0].type,
        "versions": versions(),
    }
    drafts = refuse_draft_heads(language_model, structure, recipe.draft_heads)
    if method.merges:
        refuse_unknown_neurons(language_model)
    with PeakMemory() as peak:
        removal = _removal(run, method, feasibility, structure, source.bytes, recipe.align)
        names = Names(source, language_model, removal, drafts)
        report = _report(recipe, structure, opened, run, removal)
        report.remark(read_from(source.folder))
        report.remark(parts_in_words(language_model.model))
        report.remark(windows.empty_in_words())
        report.remark(left_behind_in_words(source))
        if drafts:
            report.removed["draft heads"] = f"{len(drafts)} tensors"
        size = size_of(source, names.places)
        with block_writer(
            source, language_model, destination, trust, conditions, other_weights=size
        ) as writer:
            for entry in writer.entries:
                report.take(entry)
            if not writer.done:
                run = with_room(
                    run, writer.folder.parent, 1 + method.second_stream, resources.limit
                )
                _write(Slicing(run, method, removal, names), writer, report, trust)
            report.peak_bytes, report.out = peak.bytes, Path(destination.out)
            made = source.folder, report, windows.record(), destination.command, options
            writer.finish(pruning_record(*made))
    return report


def _block_run(opened: Opened, resources: Resources, progress: Progress) -> BlockRun:
    """The calibration windows on their way through the blocks."""
    return BlockRun(
        opened.language_model,
        opened.windows.ids,
        resources.devices,
        forward_dtype(resources.dtype, resources.devices[0]),
        resources.batch_size,
        progress=progress,
        counted=opened.windows.counted,
    )


def _write(slicing: Slicing, writer: BlockWriter, report: Report, trust: Trust) -> None:
    """Write the smaller model, and let a fresh process compare it. Raises UnsupportedModel."""
    run, _, removal, names = slicing
    result, again = writer.result, bool(writer.entries)
    assert result is not None  # structures are taken out in one process
    result.places = resized(result.source, result.partial, names.places, again=again)
    if not again:
        config, whole = run.language_model.text_config, run.language_model.model.config
        changes = {**removal.changes, **(without_draft_heads(config) if names.left_out else {})}
        text = json.loads(config.to_json_string(use_diff=False))
        configure(result, changes, text, path_of_text(whole))
        result.sync()
    run.progress.begin(f"shrinking with {report.method} to {report.pattern}")
    logits = _slice_blocks(slicing, writer, report)
    result.settle()
    run.progress.begin("loading the result in a fresh process")
    refuse_unequal(
        result.partial,
        run.tokens[:1, :CHECKED_TOKENS],
        logits,
        trust_remote_code=trust.trust_remote_code,
    )


def refuse_structure(
    feasibility: Feasibility, structure: Structure, size: int, align: int | None
) -> None:
    """Raise BadPattern or UnsupportedModel where a model of `size` bytes cannot lose that."""
    structure = within_budget(feasibility, structure, size, align)
    feasibility.removal(structure, align)
    for part in parts(structure):
        if isinstance(part, Depth):
            part.removed(len(feasibility.language_model.blocks))


def refuse_draft_heads(
    language_model: LanguageModel, structure: Structure, draft_heads: str
) -> list[str]:
    """The tensors of draft heads, which are to be dropped. Raises UnsupportedModel where they are
    not.
    """
    drafts = draft_tensors(language_model)
    if drafts and draft_heads != "drop":
        raise UnsupportedModel(
            f"The checkpoint has draft heads ({drafts[0]} and {len(drafts) - 1} more tensors), "
            f"which would no longer fit the model without {structure}. Leave them out with "
            "--draft-heads drop, or use a pattern of zeros."
        )
    return drafts


def _removal(
    run: BlockRun,
    method: StructuredMethod,
    feasibility: Feasibility,
    structure: Structure,
    size: int,
    align: int | None,
) -> Removal:
    """What goes, blocks included. Raises BadPattern or UnsupportedModel."""
    started = perf_counter()
    structure = within_budget(feasibility, structure, size, align)
    run.progress.begin("finding what belongs together")
    removal = feasibility.removal(structure, align)
    total = len(removal.kept)
    for part in parts(structure):
        if isinstance(part, Depth):
            count, selection = part.removed(total), method.selections["blocks"]
            run.progress.begin(f"choosing {part} by {selection}")
            removed = BLOCKS[selection](run, count, feasibility.holds)
            if len(removed) < count:
                raise BadPattern(
                    f"No configuration of {type(run.language_model.model).__name__} holds it "
                    f"without {part}: its kinds of block come in a fixed order. {len(removed)} "
                    "could go."
                )
            kept = [index for index in range(total) if index not in removed]
            removal = feasibility.removal(structure, align, kept)
    run.seconds.plan = perf_counter() - started
    return removal


@torch.no_grad()
def _slice_blocks(slicing: Slicing, writer: BlockWriter, report: Report) -> Tensor:
    """Slice and write every block that stays; the logits of the first window's first tokens.

    These go through the smaller blocks in float32, whatever dtype the stream has, so that they can
    be compared closely. The first blocks may be finished: they are gone through as they are.
    """
    run, method, removal, names = slicing
    model, device, count = run.language_model, run.devices[0], len(removal.kept)
    tokens, finished = run.tokens[:1, :CHECKED_TOKENS], writer.finished()
    hidden, calls = Shell(model, device, torch.float32, head=False).enter(tokens)
    for index, block in zip(removal.kept, finished, strict=False):
        hidden = run_block(working_copy(block, device, torch.float32), hidden, calls[index])
    steps = stream(run, dense=method.second_stream, kept=removal.kept, finished=finished)
    for position, step in enumerate(steps, len(finished)):
        run.progress.advance(step.name, position, count)
        original, empty = model.blocks[step.index], removal.smaller.blocks[position]
        following = removal.kept[position + 1] if position + 1 < count else len(model.blocks)
        slicer = BlockSlicer(step, original, range(step.index + 1, following), run, method)
        state, tuned = slicer.remove(removal.of(original)), None
        if method.refine:
            run.progress.advance(f"{step.name} as a whole", position, count)
            state, tuned = slicer.refine(module_of(empty, state, original), state)
        smaller = module_of(empty, state, original)
        hidden = run_block(working_copy(smaller, device, torch.float32), hidden, calls[step.index])
        step.inputs.replace(smaller)
        dense = original.state_dict()
        changed = {
            name: tensor
            for name, tensor in state.items()
            if tensor.shape != dense[name].shape or not torch.equal(tensor, dense[name])
        }
        entry = {
            "block": model.block_name(position),
            "sites": [asdict(matrix) for matrix in slicer.reports],
            "refined": tuned and (tuned.before, tuned.after),
        }
        report.take(entry)
        in_model = {f"{step.name}.{name}": tensor for name, tensor in changed.items()}
        stored, last = names.of_block(position, changed), step.last
        del step, slicer
        release_memory()
        writer.commit(in_model, entry, last=last, stored=stored)
    run.progress.advance("done", count, count)
    return Shell(model, device, torch.float32).leave(tokens, hidden).cpu()


def _report(
    recipe: Recipe, structure: Structure, opened: Opened, run: BlockRun, removal: Removal
) -> Report:
    """The report of a run that is about to begin."""
    language_model, smaller = opened.language_model, removal.smaller
    dense, left = language_model.model.num_parameters(), block_parameters(smaller)
    weights, weights_left = (
        sum(coverage(block)[0] for block in model.blocks) for model in (language_model, smaller)
    )
    return Report(
        recipe.method,
        str(structure),
        "structured",
        1 - weights_left / max(weights, 1),
        model_coverage(language_model),
        [],
        run.seconds,
        None,
        opened.windows.fingerprint(),
        parameters=(dense, dense - block_parameters(language_model) + left),
        removed=_in_words(language_model, removal),
    )


def _in_words(language_model: LanguageModel, removal: Removal) -> dict[str, str]:
    """What goes, by where: `mlp.down_proj` → `128 of 512 channels`; `blocks` → which."""
    words: dict[str, str] = {}
    for name, choice in (item for block in removal.kinds.values() for item in block.items()):
        what = f"{choice.removed} of {choice.total} {NAMES[choice.of]}"
        words[re.sub(r"\.\d+\.", ".*.", name)] = what
    blocks = [i for i in range(len(language_model.blocks)) if i not in removal.kept]
    if blocks:
        words["blocks"] = ", ".join(map(str, blocks))
    return words
