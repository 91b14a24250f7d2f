"""The program: a model and some text in, a pruned checkpoint and a record of what was done out.

    tokens → hidden states entering block i → statistics per site → (weight, kept) per site
           → the block's bytes in the result → hidden states entering block i+1 → …

`prune` is the whole of it on disk; `prune_model` does the same to a model in memory; both are the loop
`pruned_blocks` with something different done to each finished block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate import Plan, label
from secateur.block import PrunedBlock, prune_block
from secateur.checkpoint import Checkpoint, file_sha256, open_checkpoint, resolve
from secateur.data import Windows
from secateur.depth import BLOCKS
from secateur.errors import BadPattern, Interrupted, UnsupportedModel
from secateur.interrupt import asked_to_stop
from secateur.layout import check_source
from secateur.machine import release_memory, versions
from secateur.memory import arrange, check_passes
from secateur.methods import METHODS, Method, find_method
from secateur.model import LanguageModel, checkpoint_tensors, load, load_blocks
from secateur.options import check_windows, draw_calibration, find_devices, find_dtype, find_size, forward_dtype
from secateur.output import BLOCK, Output, output, refuse_output
from secateur.patterns import kind_of, parse, parse_pattern
from secateur.plan import check_allocation, is_file, make_plan
from secateur.progress import PeakMemory, Progress
from secateur.reap import EXPERTS
from secateur.record import Report, total_sparsity
from secateur.selection import SELECTIONS
from secateur.shrink import check_structure, shrink_checkpoint
from secateur.shrunk import PRESETS
from secateur.sites import coverage, signature
from secateur.stream import Seconds, stream
from secateur.structures import Structure
from secateur.trial import site_shapes
from secateur.units import Unit, movable

MINIMUM_COVERAGE = 0.95


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path,
    method: str = "default",
    pattern: str = "50%",
    allocate: str = "uniform",
    align: int | None = None,
    calibration: str | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    passes: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    allow_low_coverage: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune a model and write the result to the folder `out`; returns the report that `pruning.json` holds.

    `model` is a checkpoint folder, a hub name, or None for the embedded demo model. `pattern` is read by
    `patterns.parse`; `method` is a key of `METHODS`, with refinements, or for structures what `shrink.find_shrinking`
    knows; `allocate` says how sparsity is shared out: `uniform`, a rule of `plan.ALLOCATIONS`, or a plan's .json file,
    which decides instead of `pattern`. `align`: the channels that stay are a multiple of it. `device` may
    list several, separated by commas. `dtype` is that of the forward passes (`auto`: float32 on the CPU, else as
    stored); statistics and solving are float32, the result has the dtype of the source. `passes`: how often blocks run,
    see `pruned_blocks`; `auto` is one where activations then fit into `memory` ("6GB"; default: half of what is free).
    A run that was killed goes on after its last finished block when it is started again with the same arguments;
    `restart` discards it. Raises SecateurError in all its kinds; then `out` is untouched.
    """
    progress = progress or Progress()
    # Whatever can be refused is refused before the model is touched.
    check_method(method, pattern, allocate, skip, align)
    find_devices(device)
    find_dtype(dtype)
    find_size(memory)
    check_passes(passes)
    refuse_output(Path(out), overwrite=overwrite)
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    language_model = load(folder, trust_remote_code=trust_remote_code)
    windows = draw_calibration(
        language_model, folder, model, calibration, samples=samples, seq_len=seq_len, seed=seed, data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    report = prune_checkpoint(
        source, language_model, windows, Path(out), method=method, pattern=pattern, allocate=allocate, align=align,
        skip=skip, device=device, dtype=dtype, batch_size=batch_size, passes=passes, memory=memory,
        overwrite=overwrite, restart=restart, allow_low_coverage=allow_low_coverage,
        trust_remote_code=trust_remote_code, command=command, progress=progress,
    )  # fmt: skip
    progress.end()
    return report


def check_method(
    method: str, pattern: str, allocate: str = "uniform", skip: Sequence[str] = (), align: int | None = None
) -> None:
    """Raise UnknownName, BadPattern or BadPlan for a method, a pattern and options that do not go together."""
    structure, name = parse(pattern), method.split("+")[0]
    if isinstance(structure, Structure):
        if name in METHODS and name not in PRESETS:
            raise BadPattern(
                f"{name!r} chooses single weights; {structure} takes out whole structures. Say '50%' or '2:4'."
            )
        if allocate != "uniform":
            check_allocation(allocate, "50%")
        check_structure(structure, method, allocate, skip, align)
        return
    if name in {*SELECTIONS, *BLOCKS, *EXPERTS}:
        raise BadPattern(
            f"{name!r} chooses whole structures; {structure} is a pattern of zeros. Say '25% of channels'."
        )
    find_method(method)
    check_allocation(allocate, pattern)
    if align is not None:
        raise BadPattern(f"--align is for the channels of a structure; {structure} removes none.")


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
) -> Report:
    """`prune` for a model that is loaded from `source` already and calibration windows that are drawn already.

    A structure makes a smaller model and is another program, `shrink_checkpoint`; from here on there are zeros only.
    """
    progress = progress or Progress()
    check_method(method, pattern, allocate, skip, align)
    if isinstance(structure := parse(pattern), Structure):
        return shrink_checkpoint(
            source, language_model, windows, out, method=method, structure=structure, align=align, device=device,
            dtype=dtype, batch_size=batch_size, memory=memory, overwrite=overwrite, restart=restart,
            trust_remote_code=trust_remote_code, command=command, progress=progress,
        )  # fmt: skip
    options = {"dtype": dtype, "batch_size": batch_size, "skip": list(skip)}
    run = {
        "method": method, "pattern": str(structure), "allocate": allocate, "passes": passes, **options,
        "plan": file_sha256(Path(allocate)) if is_file(allocate) else None, "calibration": windows.fingerprint(),
        "device": find_devices(device)[0].type, "versions": versions(),
    }  # fmt: skip
    count = len(language_model.blocks)
    with (
        output(source, out, overwrite=overwrite, run=run, restart=restart) as result,
        PeakMemory() as peak,
        asked_to_stop("after this block") as stopping,
    ):
        report, pruning = _begin(
            language_model, windows, method=method, pattern=pattern, allocate=allocate, skip=skip, device=device,
            dtype=dtype, batch_size=batch_size, passes=passes, memory=memory, allow_low_coverage=allow_low_coverage,
            progress=progress, result=result,
        )  # fmt: skip
        for entry in (finished := result.recorded(BLOCK)):
            report.take(entry)
        if 0 < len(finished) < count:
            pruning.finished = load_blocks(result.partial, trust_remote_code=trust_remote_code)[: len(finished)]
        for block in pruned_blocks(language_model, windows.ids, pruning) if len(finished) < count else ():
            check_source(source, language_model, list(block.tensors))
            entry = block.entry(language_model.block_name(block.index))
            result.commit(checkpoint_tensors(language_model, block.tensors, source.places), entry)
            report.take(entry)
            if stopping() and block.index < count - 1:
                raise Interrupted("Stopped.")
        report.sparsity, report.peak_bytes, report.out = total_sparsity(report.sites), peak.bytes, out
        result.finish(
            {
                "schema": "secateur.pruning/1",
                "model": str(source.folder),
                "command": list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]],
                "versions": versions(),
                **report.record(),
                "options": {**options, "passes": pruning.passes},
            }
        )
    return report


def prune_model(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str = "default",
    pattern: str = "50%",
    allocate: str = "uniform",
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    passes: str = "auto",
    memory: str | int | None = None,
    allow_low_coverage: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in memory, in place; arguments as for `prune`. Nothing is written to disk.

    Raises BadPattern for a structure, which leaves another model: use `prune`.
    """
    parse_pattern(pattern)
    with PeakMemory() as peak:
        report, pruning = _begin(
            language_model, windows, method=method, pattern=pattern, allocate=allocate, skip=skip, device=device,
            dtype=dtype, batch_size=batch_size, passes=passes, memory=memory, allow_low_coverage=allow_low_coverage,
            progress=progress or Progress(),
        )  # fmt: skip
        for block in pruned_blocks(language_model, windows.ids, pruning):
            for name, tensor in block.tensors.items():
                language_model.model.get_parameter(name).data.copy_(tensor)
            report.take(block.entry(language_model.block_name(block.index)))
    report.sparsity, report.peak_bytes = total_sparsity(report.sites), peak.bytes
    return report


@dataclass
class Pruning:
    """A run as it has been decided: what `pruned_blocks` needs to know.

    `passes`: with "one" a block runs once, and every site sees what the pruned sites before it give. With "two" it runs
    once for the statistics of all sites and once for what enters the next block; a `sequential` method then costs a
    forward for each group of sites that share an input. A method that refines runs the finished block once more; one
    that reads "cross" or refines costs a second stream, through the dense model. `finished`: what the first blocks
    have become already; they are gone through and not given again.
    """

    method: Method
    plan: Plan
    devices: Sequence[torch.device]
    dtype: torch.dtype | None
    batch_size: int
    progress: Progress = field(default_factory=Progress)
    seconds: Seconds = field(default_factory=Seconds)
    passes: str = "one"
    spill: Path | None = None
    finished: Sequence[nn.Module] = ()


def pruned_blocks(language_model: LanguageModel, tokens: Tensor, pruning: Pruning) -> Iterator[PrunedBlock]:
    """Every block in order, pruned on calibration tokens `[samples, length]`."""
    method, progress, count = pruning.method, pruning.progress, len(language_model.blocks)
    kinds: dict[Any, dict[str, list[list[Unit]]]] = {}  # units that may change places, by kind of block
    if not method.need and not method.refine:
        tokens = tokens[: pruning.batch_size]  # enough for the probe on which errors are measured
    steps = stream(
        language_model, tokens, devices=pruning.devices, dtype=pruning.dtype, batch_size=pruning.batch_size,
        seconds=pruning.seconds, dense=two_streams(method), finished=pruning.finished, spill=pruning.spill,
    )  # fmt: skip
    for step in steps:
        progress.advance(f"{step.name} inputs", step.index, count)
        original = language_model.blocks[step.index]
        units = {}
        if method.permute:
            if (kind := signature(original)) not in kinds:
                progress.advance(f"{step.name} traced", step.index, count)
                kinds[kind] = movable(language_model, step.index, pruning.devices[0])
            units = kinds[kind]
        block = prune_block(
            step, original, method, pruning.plan,
            lambda name, index=step.index: progress.advance(name, index, count), units,
            one_pass=pruning.passes == "one" and not method.permute,
        )  # fmt: skip
        del step  # with its copy of the block: the next is made before the name is used again
        yield block
        block.tensors.clear()
    progress.advance("done", count, count)


def two_streams(method: Method) -> bool:
    """Whether a method needs what the dense model gives beside what the pruned one gives."""
    return "cross" in method.need or method.refine > 0


def _begin(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str,
    pattern: str,
    allocate: str,
    skip: Sequence[str],
    device: str,
    dtype: str,
    batch_size: int,
    passes: str,
    memory: str | int | None,
    allow_low_coverage: bool,
    progress: Progress,
    result: Output | None = None,
) -> tuple[Report, Pruning]:
    """The plan and everything else of a run that is about to start; `result` knows what it had decided before it died.

    Raises UnsupportedModel for too low a coverage.
    """
    check_windows(language_model, windows, batch_size)
    counts = [coverage(block) for block in language_model.blocks]
    share = sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)
    if share < MINIMUM_COVERAGE and not allow_low_coverage:
        raise UnsupportedModel(
            f"Only {share:.1%} of the block weights of {type(language_model.model).__name__} are prunable matrices; "
            f"{MINIMUM_COVERAGE:.0%} are wanted, since {parse(pattern)} of those would be less of the model than it "
            "says. Allow it with --allow-low-coverage."
        )
    started = perf_counter()
    found, devices = find_method(method), find_devices(device)
    forward = forward_dtype(find_dtype(dtype), devices[0])
    way = arrange(
        language_model, windows.ids.shape, passes=passes, limit=find_size(memory), dtype=forward, device=devices[0],
        dense=two_streams(found),
    )  # fmt: skip
    decided = result.recorded("decided") if result else []
    if not decided:
        made = make_plan(
            language_model, windows, allocate, method=method, pattern=pattern, skip=skip, device=device, dtype=dtype,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        decided = [{"passes": way.passes, "plan": {name: str(part) for name, part in made.items()}}]
        if result:
            result.record("decided", decided[0])
    plan = {name: parse_pattern(part) for name, part in decided[0]["plan"].items()}
    seconds = Seconds(plan=perf_counter() - started)
    release_memory()
    shown = label(plan, site_shapes(language_model)) if is_file(allocate) else str(parse(pattern))
    progress.begin(f"pruning with {method} to {shown}")
    report = Report(
        method, shown, kind_of(plan.values()), 0.0, share, [], seconds, None, windows.fingerprint(), allocate
    )
    spill = (result.out.parent if result else Path(gettempdir())) if way.spill else None
    return report, Pruning(found, plan, devices, forward, batch_size, progress, seconds, decided[0]["passes"], spill)
