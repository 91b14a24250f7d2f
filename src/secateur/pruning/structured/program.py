"""The program for structured pruning: the same stream as `prune`, but what comes out is a smaller
dense model.

    survey: what can go, and the stock configuration that holds the rest → which blocks go
    → for each block that stays: statistics → which units go → repair of what reads them → the block cut
    → the block's bytes in the result → hidden states entering the next block → …
    → the written model loaded by a fresh process, its logits compared with those of the stream

Whatever can be refused is refused by the survey, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.record import Report
from secateur.checkpoints.result import BLOCK, Output, output
from secateur.checkpoints.shards import resized, size_of
from secateur.data.windows import Windows
from secateur.errors import BadPattern, Interrupted
from secateur.methods.structures import NAMES, Budget, Depth, Structure, parts
from secateur.models.context import check_windows, width
from secateur.models.load import load_blocks
from secateur.models.mapped_tensors import hidden_bytes
from secateur.models.matrices import model_coverage, weight_matrices
from secateur.models.replay import LanguageModel, Shell, run_block, working_copy
from secateur.models.stored import check_source
from secateur.models.stream.blocks import BlockRun, stream
from secateur.pruning.structured.block import Run, refined, smaller_block
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.feasibility import Feasibility, block_parameters, holds, survey
from secateur.pruning.structured.method import find_structured_method
from secateur.pruning.structured.names import Names
from secateur.pruning.structured.size_budget import within_budget
from secateur.pruning.structured.slicing import module_of
from secateur.pruning.structured.verify import refuse_unequal
from secateur.system.devices import find_devices, find_dtype, forward_dtype
from secateur.system.interrupt import asked_to_stop
from secateur.system.machine import typed_command, versions
from secateur.system.memory import PeakMemory, available_bytes, release_memory
from secateur.system.progress import Progress
from secateur.system.sizes import find_size

CHECKED_TOKENS = 256
"""How many tokens of the first window the reloaded model is compared on."""


def shrink_checkpoint(
    source: Checkpoint,
    language_model: LanguageModel,
    windows: Windows,
    out: Path,
    *,
    method: str,
    structure: Structure,
    align: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    memory: str | int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """`prune_checkpoint` for a structure: writes the smaller model to `out`; returns the report in
    `pruning.json`.
    """
    progress = progress or Progress()
    shrinking = find_structured_method(method, structure)
    check_windows(language_model, windows, batch_size)
    devices, chosen = find_devices(device), find_dtype(dtype)
    forward = forward_dtype(chosen, devices[0])
    blocks = BlockRun(language_model, windows.ids, devices, forward, batch_size, progress=progress)
    run = Run(blocks, shrinking)
    options = {"dtype": dtype, "batch_size": batch_size, "align": align}
    conditions = {
        "method": method,
        "pattern": str(structure),
        **options,
        "calibration": windows.fingerprint(),
        "device": devices[0].type,
        "versions": versions(),
    }
    with PeakMemory() as peak:
        started = perf_counter()
        wanted = structure
        if isinstance(structure, Budget):
            wanted = within_budget(language_model, structure, source.bytes, align, devices[0])
        found = _surveyed(run, wanted, align)
        run.blocks.seconds.plan = perf_counter() - started
        share = model_coverage(language_model)
        dense = language_model.model.num_parameters()
        report = Report(
            method,
            str(structure),
            "structured",
            0.0,
            share,
            [],
            run.blocks.seconds,
            None,
            windows.fingerprint(),
            parameters=(
                dense,
                dense
                - block_parameters(language_model)
                + block_parameters(found.stock.language_model),
            ),
            removed=_in_words(language_model, found),
        )
        names = Names(source, language_model, found.stock.language_model, found.kept)
        tensors = names.places()
        with (
            output(
                source,
                out,
                overwrite=overwrite,
                other_weights=size_of(source, tensors),
                run=conditions,
                restart=restart,
            ) as result,
            asked_to_stop("after this block") as stopping,
        ):
            finished = result.recorded(BLOCK)
            for entry in finished:
                report.take(entry)
            again = []
            if not result.done:
                result.places = resized(source, result.partial, tensors, again=len(finished) > 0)
                if finished:
                    spill = result.partial.parent if language_model.spilled else None
                    loaded = load_blocks(
                        result.partial, trust_remote_code=trust_remote_code, spill=spill
                    )
                    again = loaded[: len(finished)]
                else:
                    result.configure(found.stock.changes, language_model.model.config.model_type)
                    result.sync()
                progress.begin(f"shrinking with {method} to {structure}")
                logits = _shrink(
                    run, found, report, names, result, again, stopping, find_size(memory)
                )
                result.settle()
                _verify(result, windows.ids, logits, trust_remote_code, progress)
            report.sparsity = _share_gone(language_model, found)
            report.peak_bytes, report.out = peak.bytes, out
            result.finish(
                {
                    "schema": "secateur.pruning/1",
                    "model": str(source.folder),
                    "command": typed_command(command),
                    "versions": versions(),
                    **report.record(),
                    "options": options,
                }
            )
    return report


def refuse_structure(
    language_model: LanguageModel,
    structure: Structure,
    size: int,
    align: int | None,
    device: torch.device,
) -> None:
    """Raise BadPattern or UnsupportedModel where a model, `size` bytes of weights, cannot be made
    smaller like that.
    """
    if isinstance(structure, Budget):
        structure = within_budget(language_model, structure, size, align, device)
    survey(language_model, structure, range(len(language_model.blocks)), align, device)
    for part in parts(structure):
        if isinstance(part, Depth):
            part.removed(len(language_model.blocks))


def _surveyed(run: Run, structure: Structure, align: int | None) -> Feasibility:
    """What goes, blocks included. Raises BadPattern or UnsupportedModel."""
    total = len(run.blocks.language_model.blocks)
    kept, gone = list(range(total)), list[int]()
    run.blocks.progress.begin("finding what belongs together")
    found = survey(run.blocks.language_model, structure, kept, align, run.blocks.devices[0])
    for part in parts(structure):
        if isinstance(part, Depth):
            count = part.removed(total)
            run.blocks.progress.begin(f"choosing {part} by {run.shrinking.selections['blocks']}")
            gone = BLOCKS[run.shrinking.selections["blocks"]](
                run.blocks, count, holds(run.blocks.language_model)
            )
            if len(gone) < count:
                raise BadPattern(
                    f"No configuration of {type(run.blocks.language_model.model).__name__} holds "
                    f"it without {part}: its kinds "
                    f"of block come in a fixed order. {len(gone)} could go."
                )
    if gone:
        found = survey(
            run.blocks.language_model,
            structure,
            [i for i in kept if i not in gone],
            align,
            run.blocks.devices[0],
        )
    return found


@torch.no_grad()
def _shrink(
    run: Run,
    found: Feasibility,
    report: Report,
    names: Names,
    result: Output,
    again: Sequence[nn.Module],
    stopping: Callable[[], bool],
    limit: int | None,
) -> Tensor:
    """Shrink and write every block that stays; the logits of the first window's first tokens in the
    smaller model.

    These go through the smaller blocks in float32, whatever dtype the stream has, so that they can
    be compared closely. The first blocks may be done `again`: they are gone through as they are.
    Hidden states that would take half of `limit`, or of what is free, lie in a file.
    """
    model, count, device = run.blocks.language_model, len(found.kept), run.blocks.devices[0]
    tokens = run.blocks.tokens[:1, :CHECKED_TOKENS]
    hidden, calls = Shell(model, device, torch.float32, head=False).enter(tokens)
    for index, block in zip(found.kept, again, strict=False):
        hidden = run_block(working_copy(block, device, torch.float32), hidden, calls[index])
    held = hidden_bytes(
        run.blocks.tokens.shape, width(model), run.blocks.dtype or model.model.dtype
    )
    held *= 2 if run.shrinking.second_stream else 1
    free = available_bytes(device) if limit is None else limit
    spill = result.out.parent if held > free / 2 else None
    steps = stream(
        replace(run.blocks, spill=spill),
        dense=run.shrinking.second_stream,
        kept=found.kept,
        finished=again,
    )
    for position, step in enumerate(steps, len(again)):
        run.blocks.progress.advance(step.name, position, count)
        original, empty = model.blocks[step.index], found.stock.language_model.blocks[position]
        span = _span(found.kept, position, len(model.blocks))
        state, reports = smaller_block(step, original, found.of(original), span, run)
        entry: dict[str, Any] = {
            "block": model.block_name(position),
            "sites": [asdict(site) for site in reports],
            "refined": None,
        }
        if run.shrinking.refine:
            run.blocks.progress.advance(f"{step.name} as a whole", position, count)
            state, tuned = refined(step, module_of(empty, state, original), state, span, run)
            entry["refined"] = (tuned.before, tuned.after)
        smaller = module_of(empty, state, original)
        hidden = run_block(working_copy(smaller, device, torch.float32), hidden, calls[step.index])
        step.replace(smaller)
        held = original.state_dict()
        changed = {
            n: t
            for n, t in state.items()
            if t.shape != held[n].shape or not torch.equal(t, held[n])
        }
        check_source(result.source, model, [f"{step.name}.{name}" for name in changed])
        result.commit(names.of_block(position, changed), entry)
        report.take(entry)
        del step
        release_memory()
        if stopping() and position < count - 1:
            raise Interrupted("Stopped.")
    run.blocks.progress.advance("done", count, count)
    return Shell(model, device, torch.float32).leave(tokens, hidden).cpu()


def _span(kept: Sequence[int], position: int, total: int) -> list[int]:
    """The blocks that are gone between a block that stays and the next one."""
    following = kept[position + 1] if position + 1 < len(kept) else total
    return list(range(kept[position] + 1, following))


def _verify(
    result: Output, tokens: Tensor, logits: Tensor, trust_remote_code: bool, progress: Progress
) -> None:
    progress.begin("loading the result in a fresh process")
    refuse_unequal(
        result.partial, tokens[:1, :CHECKED_TOKENS], logits, trust_remote_code=trust_remote_code
    )


def _share_gone(language_model: LanguageModel, found: Feasibility) -> float:
    """The share of the blocks' matrix weights that are gone."""
    before, after = (
        sum(
            site.stored.numel()
            for block in model.blocks
            for site in weight_matrices(block).values()
        )
        for model in (language_model, found.stock.language_model)
    )
    return 1 - after / max(before, 1)


def _in_words(language_model: LanguageModel, found: Feasibility) -> dict[str, str]:
    """What goes, by where: `mlp.down_proj` → `128 of 512 channels`; `blocks` → which."""
    words: dict[str, str] = {}
    for cut in found.kinds.values():
        for name, consumer in cut.consumers.items():
            words[re.sub(r"\.\d+\.", ".*.", name)] = (
                f"{consumer.gone} of {len(consumer.units)} {NAMES[consumer.of]}"
            )
        for name, (total, gone) in cut.experts.items():
            words[name] = f"{gone} of {total} experts"
    if gone := [i for i in range(len(language_model.blocks)) if i not in found.kept]:
        words["blocks"] = ", ".join(map(str, gone))
    return words
