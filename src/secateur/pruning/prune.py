"""The program: a model and some text in, a pruned checkpoint and a record of what was done out.

    tokens → hidden states entering block i → statistics per site → (weight, kept) per site
           → the block's bytes in the result → hidden states entering block i+1 → …

`prune` is the whole of it on disk; `prune_model` does the same to a model in memory; both are the
loop `pruned_blocks` with something different done to each finished block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.record import Report, total_sparsity
from secateur.checkpoints.result import BLOCK, Output, output, refuse_output
from secateur.data.windows import Windows
from secateur.errors import Interrupted, UnsupportedModel
from secateur.methods.patterns import parse, parse_pattern
from secateur.methods.structures import Structure
from secateur.models.channels.groups import ChannelGroup, interchangeable_groups
from secateur.models.load import load_blocks
from secateur.models.matrices import signature
from secateur.models.replay import LanguageModel
from secateur.models.stored import check_source, checkpoint_tensors
from secateur.models.stream.blocks import stream
from secateur.models.stream.distributed import ALONE, Ranks, joined
from secateur.pruning.block import PrunedBlock, prune_block
from secateur.pruning.check import check_method
from secateur.pruning.opening import opened
from secateur.pruning.planning.allocation import is_file
from secateur.pruning.planning.memory import check_passes
from secateur.pruning.planning.passes import needs_dense
from secateur.pruning.prepare import Pruning, decide
from secateur.pruning.structured.program import shrink_checkpoint
from secateur.system.devices import calibration_dtype, find_devices, find_dtype
from secateur.system.files import file_sha256
from secateur.system.interrupt import asked_to_stop
from secateur.system.machine import typed_command, versions
from secateur.system.memory import PeakMemory
from secateur.system.progress import Progress
from secateur.system.settings import CalibrationText, Compute, Destination, Recipe, Trust
from secateur.system.sizes import find_size


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    allocate: str = Recipe.allocate,
    align: int | None = Recipe.align,
    calibration: str | None = CalibrationText.calibration,
    samples: int = CalibrationText.samples,
    seq_len: int | None = CalibrationText.seq_len,
    seed: int = CalibrationText.seed,
    skip: Sequence[str] = Recipe.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    data_dir: str | Path | None = CalibrationText.data_dir,
    overwrite: bool = Destination.overwrite,
    restart: bool = Destination.restart,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    trust_remote_code: bool = Trust.trust_remote_code,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune a model and write the result to the folder `out`; returns the report that
    `pruning.json` holds.

    `model` is a checkpoint folder, a hub name, or None for the embedded demo model. `pattern` is
    read by `patterns.parse`; `method` is a key of `METHODS`, with refinements, or for structures
    what `structured.method.find_structured_method` knows; `allocate` says how sparsity is shared out:
    `uniform`, a rule of `measured.ALLOCATIONS`, or a plan's .json file, which decides instead of
    `pattern`. `align`: the channels that stay are a multiple of it. `device` may list several,
    separated by commas. `dtype` is that of the forward passes (`auto`: as stored; on a CPU float32,
    but for bfloat16 where it can multiply it); statistics and solving are float32, the result has
    the dtype of the source. `passes`: how often blocks run, see `Pruning`; `auto` is one where that
    fits into `memory` ("6GB"; default: what is free), in batches of `batch_size` windows or fewer.
    A run that was killed goes on after its last finished block when it is started again with the
    same arguments; `restart` discards it. Raises SecateurError in all its kinds; then `out` is
    untouched.
    """
    # Whatever can be refused is refused before the model is touched.
    check_method(method, pattern, allocate, skip, align)
    find_dtype(dtype)
    find_size(memory)
    check_passes(passes)
    refuse_output(Path(out), overwrite=overwrite)
    with joined(device) as (ranks, device):
        find_devices(device)
        progress = (progress if ranks.first else None) or Progress()
        source, language_model, windows = opened(
            model,
            calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            data_dir=data_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
            out=Path(out),
            memory=memory,
        )
        report = prune_checkpoint(
            source,
            language_model,
            windows,
            Path(out),
            method=method,
            pattern=pattern,
            allocate=allocate,
            align=align,
            skip=skip,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            passes=passes,
            memory=memory,
            overwrite=overwrite,
            restart=restart,
            allow_low_coverage=allow_low_coverage,
            trust_remote_code=trust_remote_code,
            command=command,
            progress=progress,
            ranks=ranks,
        )
    progress.end()
    return report


def prune_checkpoint(
    source: Checkpoint,
    language_model: LanguageModel,
    windows: Windows,
    out: Path,
    *,
    method: str,
    pattern: str,
    allocate: str = "uniform",
    align: int | None = None,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    passes: str = "auto",
    memory: str | int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    allow_low_coverage: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """`prune` for a model that is loaded from `source` already and calibration windows that are
    drawn already.

    A structure makes a smaller model and is another program, `shrink_checkpoint`; from here on
    there are zeros only.
    """
    progress = progress or Progress()
    check_method(method, pattern, allocate, skip, align)
    if isinstance(structure := parse(pattern), Structure):
        if ranks.size > 1:
            raise UnsupportedModel(f"{structure} is taken out in one process; found {ranks.size}.")
        return shrink_checkpoint(
            source,
            language_model,
            windows,
            out,
            method=method,
            structure=structure,
            align=align,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            memory=memory,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            command=command,
            progress=progress,
        )
    first, stored = find_devices(device)[0], language_model.model.dtype
    forward = calibration_dtype(find_dtype(dtype), first, stored) or stored
    options = {
        "dtype": str(forward).removeprefix("torch."),
        "batch_size": batch_size,
        "skip": list(skip),
    }
    run = {
        "method": method,
        "pattern": str(structure),
        "allocate": allocate,
        "passes": passes,
        **options,
        "plan": file_sha256(Path(allocate)) if is_file(allocate) else None,
        "calibration": windows.fingerprint(),
        "device": first.type,
        "versions": versions(),
    }
    count = len(language_model.blocks)
    with ExitStack() as stack:
        entered: list[Output] = []
        ranks.same(  # rank 0 writes
            lambda: entered.append(
                stack.enter_context(
                    output(source, out, overwrite=overwrite, run=run, restart=restart)
                )
            )
        )
        result = entered[0] if entered else None
        peak, stopping = (
            stack.enter_context(PeakMemory()),
            stack.enter_context(asked_to_stop("after this block")),
        )
        finished, decided, partial = ranks.same(
            lambda: (
                (result.recorded(BLOCK), result.recorded("decided"), result.partial)
                if result
                else ([], [], out)
            )
        )
        report, pruning = decide(
            language_model,
            windows,
            method=method,
            pattern=pattern,
            allocate=allocate,
            skip=skip,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            passes=passes,
            memory=memory,
            allow_low_coverage=allow_low_coverage,
            progress=progress,
            spill=partial.parent,
            decided=decided[0] if decided else None,
            ranks=ranks,
        )
        if result and not decided:
            result.record("decided", pruning.decisions())
        for entry in finished:
            report.take(entry)
        if 0 < len(finished) < count:
            spill = partial.parent if language_model.spilled else None
            loaded = load_blocks(partial, trust_remote_code=trust_remote_code, spill=spill)
            pruning.finished = loaded[: len(finished)]
        for block in (
            pruned_blocks(language_model, windows.ids, pruning) if len(finished) < count else ()
        ):
            entry = block.entry(language_model.block_name(block.index))
            report.take(entry)
            if result:
                check_source(source, language_model, list(block.tensors))
                result.commit(
                    checkpoint_tensors(language_model, block.tensors, source.places), entry
                )
            if ranks.same(stopping) and block.index < count - 1:
                raise Interrupted("Stopped.")
        report.sparsity, report.peak_bytes, report.out = (
            total_sparsity(report.sites),
            peak.bytes,
            out,
        )
        if result:
            result.finish(
                {
                    "schema": "secateur.pruning/1",
                    "model": str(source.folder),
                    "command": typed_command(command),
                    "versions": versions(),
                    **report.record(),
                    "options": {
                        **options,
                        "passes": pruning.passes,
                        "batch_size": pruning.batch_size,
                    },
                }
            )
        ranks.together(lambda: None)  # nobody leaves before the result has its name
    return report


def prune_model(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    allocate: str = Recipe.allocate,
    skip: Sequence[str] = Recipe.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in memory, in place; arguments as for `prune`. Nothing is written to disk.

    Raises BadPattern for a structure, which leaves another model: use `prune`.
    """
    parse_pattern(pattern)
    with PeakMemory() as peak:
        report, pruning = decide(
            language_model,
            windows,
            method=method,
            pattern=pattern,
            allocate=allocate,
            skip=skip,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            passes=passes,
            memory=memory,
            allow_low_coverage=allow_low_coverage,
            progress=progress or Progress(),
            spill=Path(gettempdir()),
        )
        for block in pruned_blocks(language_model, windows.ids, pruning):
            for name, tensor in block.tensors.items():
                language_model.model.get_parameter(name).data.copy_(tensor)
            report.take(block.entry(language_model.block_name(block.index)))
    report.sparsity, report.peak_bytes = total_sparsity(report.sites), peak.bytes
    return report


def pruned_blocks(
    language_model: LanguageModel, tokens: Tensor, pruning: Pruning
) -> Iterator[PrunedBlock]:
    """Every block in order, pruned on calibration tokens `[samples, length]`."""
    method, progress, count = pruning.method, pruning.progress, len(language_model.blocks)
    kinds: dict[
        Any, dict[str, list[list[ChannelGroup]]]
    ] = {}  # units that may change places, by kind of block
    if not method.need and not method.refine:
        tokens = tokens[: pruning.batch_size]  # enough for the probe on which errors are measured
    steps = stream(
        language_model,
        tokens,
        devices=pruning.devices,
        dtype=pruning.dtype,
        batch_size=pruning.batch_size,
        seconds=pruning.seconds,
        dense=needs_dense(method),
        finished=pruning.finished,
        spill=pruning.spill,
        ranks=pruning.ranks,
    )
    for step in steps:
        progress.advance(f"{step.name} inputs", step.index, count)
        original = language_model.blocks[step.index]
        units = {}
        if method.permute:
            if (kind := signature(original)) not in kinds:
                progress.advance(f"{step.name} traced", step.index, count)
                kinds[kind] = interchangeable_groups(language_model, step.index, pruning.devices[0])
            units = kinds[kind]
        block = prune_block(
            step,
            original,
            method,
            pruning.plan,
            lambda name, index=step.index: progress.advance(name, index, count),
            units,
            one_pass=pruning.passes == "one" and not method.permute,
            ranks=pruning.ranks,
        )
        del step  # with its copy of the block: the next is made before the name is used again
        yield block
        block.tensors.clear()
    progress.advance("done", count, count)
