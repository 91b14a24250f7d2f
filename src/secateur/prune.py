"""The program: a model and some text in, a pruned checkpoint and a record of what was done out.

    tokens → hidden states entering block i → statistics per site → (weight, kept) per site
           → the block's bytes in the result → hidden states entering block i+1 → …

`prune` is the whole of it on disk; `prune_model` does the same to a model in memory; both are the loop
`pruned_blocks` with something different done to each finished block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from secateur.allocate import Plan, uniform
from secateur.checkpoint import Checkpoint, open_checkpoint, output, refuse_output, resolve
from secateur.data import Windows, calibration_windows, load_tokenizer
from secateur.errors import NonFinite, UnsupportedModel
from secateur.machine import release_memory, versions
from secateur.methods import Method, find_method
from secateur.model import LanguageModel, checkpoint_tensors, load, working_copy
from secateur.options import (
    check_windows,
    default_corpus,
    default_length,
    find_devices,
    find_dtype,
    forward_dtype,
)
from secateur.patterns import Pattern, parse
from secateur.progress import PeakMemory, Progress
from secateur.record import LEFT_OUT, UNSEEN, Report, SiteReport, left_dense, total_sparsity
from secateur.sites import Site, coverage, sites
from secateur.stats import Stats
from secateur.stream import Seconds, Step, stream

MINIMUM_COVERAGE = 0.95
PROBE_TOKENS = 1024
"""On how many calibration tokens, about, the output error of every site is measured."""


@dataclass
class PrunedBlock:
    """A finished block: the parameters that changed, by their name in the model, in the dtype they are stored in."""

    index: int
    tensors: dict[str, Tensor]
    reports: list[SiteReport] = field(default_factory=list)


def prune(
    model: str | Path | None = None,
    *,
    out: str | Path,
    method: str = "default",
    pattern: str = "50%",
    calibration: str | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    sequential: bool = False,
    dense_target: bool = False,
    data_dir: str | Path | None = None,
    overwrite: bool = False,
    allow_low_coverage: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune a model and write the result to the folder `out`; returns the report that `pruning.json` holds.

    `model` is a checkpoint folder, a hub name, or None for the embedded demo model. `pattern` is read by
    `patterns.parse`; `method` is a key of `METHODS`. `device` may list several, separated by commas. `dtype` is
    that of the forward passes (`auto`: float32 on the CPU, else as stored); statistics and solving are float32,
    the result has the dtype of the source. Raises SecateurError in all its kinds; then `out` is untouched.
    """
    progress = progress or Progress()
    # Whatever can be refused is refused before the model is touched.
    find_method(method)
    parse(pattern)
    find_devices(device)
    find_dtype(dtype)
    refuse_output(Path(out), overwrite=overwrite)
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    language_model = load(folder, trust_remote_code=trust_remote_code)
    windows = calibration_windows(
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        default_corpus(model, calibration, "c4"),
        samples=samples,
        length=seq_len or default_length(language_model),
        seed=seed,
        data_dir=Path(data_dir) if data_dir else None,
    )
    report = prune_checkpoint(
        source, language_model, windows, Path(out), method=method, pattern=pattern, skip=skip, device=device,
        dtype=dtype, batch_size=batch_size, sequential=sequential, dense_target=dense_target, overwrite=overwrite,
        allow_low_coverage=allow_low_coverage, command=command, progress=progress,
    )  # fmt: skip
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
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    sequential: bool = False,
    dense_target: bool = False,
    overwrite: bool = False,
    allow_low_coverage: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """`prune` for a model that is loaded from `source` already and calibration windows that are drawn already."""
    progress, wanted = progress or Progress(), parse(pattern)
    check_windows(language_model, windows, batch_size)
    plan = uniform(site_shapes(language_model), wanted, skip)
    report = _report(language_model, method, wanted, windows, allow_low_coverage)
    with output(source, out, overwrite=overwrite) as result, PeakMemory() as peak:
        progress.begin(f"pruning with {method} to {pattern}")
        blocks = pruned_blocks(
            language_model, windows.ids, find_method(method), plan, devices=find_devices(device),
            dtype=find_dtype(dtype), batch_size=batch_size, seconds=report.seconds, progress=progress,
            sequential=sequential, dense_target=dense_target,
        )  # fmt: skip
        for block in blocks:
            _check_source(source, language_model, list(block.tensors))
            result.write(checkpoint_tensors(language_model, block.tensors, source.places))
            report.sites += block.reports
        report.sparsity, report.peak_bytes, report.out = total_sparsity(report.sites), peak.bytes, out
        result.finish(
            {
                "schema": "secateur.pruning/1",
                "model": str(source.folder),
                "command": list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]],
                "versions": versions(),
                **report.record(),
                "options": {
                    "dtype": dtype,
                    "batch_size": batch_size,
                    "skip": list(skip),
                    "sequential": sequential,
                    "dense_target": dense_target,
                },
            }
        )
    return report


def _check_source(source: Checkpoint, language_model: LanguageModel, names: Sequence[str]) -> None:
    """Raise UnsupportedModel unless the parameters, turned back, are the bytes that the source holds."""
    loaded = {name: language_model.model.get_parameter(name).data for name in names}
    for name, tensor in checkpoint_tensors(language_model, loaded, source.places).items():
        held = source.tensor(name)
        if held.dtype != tensor.dtype or not torch.equal(held, tensor):
            raise UnsupportedModel(f"{name} in {source.folder} is not what the model was loaded with.")


def prune_model(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str = "default",
    pattern: str = "50%",
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    sequential: bool = False,
    dense_target: bool = False,
    allow_low_coverage: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in memory, in place; arguments as for `prune`. Nothing is written to disk."""
    wanted = parse(pattern)
    plan = uniform(site_shapes(language_model), wanted, skip)
    report = _report(language_model, method, wanted, windows, allow_low_coverage)
    with PeakMemory() as peak:
        for block in pruned_blocks(
            language_model, windows.ids, find_method(method), plan, devices=find_devices(device),
            dtype=find_dtype(dtype), batch_size=batch_size, seconds=report.seconds, progress=progress or Progress(),
            sequential=sequential, dense_target=dense_target,
        ):  # fmt: skip
            for name, tensor in block.tensors.items():
                language_model.model.get_parameter(name).data.copy_(tensor)
            report.sites += block.reports
    report.sparsity, report.peak_bytes = total_sparsity(report.sites), peak.bytes
    return report


def pruned_blocks(
    language_model: LanguageModel,
    tokens: Tensor,
    method: Method,
    plan: Plan,
    *,
    devices: Sequence[torch.device],
    dtype: str,
    batch_size: int,
    seconds: Seconds,
    progress: Progress,
    sequential: bool = False,
    dense_target: bool = False,
) -> Iterator[PrunedBlock]:
    """Every block in order, pruned by `method` after `plan` on calibration tokens `[samples, length]`.

    `sequential`: inside a block too, each site's inputs come from the sites pruned before it, at the price of one
    forward pass of the block for each group of sites that share an input. `dense_target`: solvers aim at what the
    dense model computes from its own inputs, at the price of a second stream. It takes `sequential` along: without
    it every site of a block would make up for the whole error of the blocks before, and together they do too much.
    """
    count = len(language_model.blocks)
    dense_target = dense_target and "gram" in method.need
    sequential = sequential or dense_target
    if not method.need:
        tokens = tokens[:batch_size]  # enough for the probe on which errors are measured
    steps = stream(
        language_model, tokens, devices=devices, dtype=forward_dtype(dtype, devices[0]),
        batch_size=batch_size, seconds=seconds, dense=dense_target,
    )  # fmt: skip
    for step in steps:
        progress.advance(f"{step.name} inputs", step.index, count)
        original = language_model.blocks[step.index]
        block = _prune_block(
            step, original, method, plan, lambda name, index=step.index: progress.advance(name, index, count),
            sequential=sequential, dense_target=dense_target,
        )  # fmt: skip
        del step  # with its copy of the block: the next is made before the name is used again
        yield block
        block.tensors.clear()
    progress.advance("done", count, count)


def _prune_block(
    step: Step,
    original: nn.Module,
    method: Method,
    plan: Plan,
    at_hand: Callable[[str], None],
    *,
    sequential: bool,
    dense_target: bool,
) -> PrunedBlock:
    """Prune the sites of one block, in the copy on which the stream goes on and in another as it is stored."""
    result = working_copy(original, torch.device("cpu"), None)
    targets = sites(result)
    _refuse_non_finite(step, targets)
    need = method.need | {"cross"} if dense_target else method.need
    block = PrunedBlock(step.index, {})
    for group in step.groups() if sequential else [list(step.sites)]:
        observed = step.observe(need, PROBE_TOKENS, group)
        started = perf_counter()
        for name in group:
            site, full_name = step.sites[name], f"{step.name}.{name}"
            at_hand(full_name)
            pattern, stats = plan.get(full_name), observed.stats.get(name, Stats(0, {}))
            if pattern is None or (method.need and not stats.tokens):
                block.reports.append(left_dense(full_name, site, LEFT_OUT if pattern is None else UNSEEN))
                continue
            probe = observed.probes.get(name)
            block.reports.append(prune_site(full_name, site, targets[name], method, stats, pattern, probe))
            block.tensors[f"{step.name}.{site.parameter}"] = result.get_parameter(site.parameter).data
            release_memory()
        step.seconds.solve += perf_counter() - started
    return block


def prune_site(
    name: str,
    site: Site,
    target: Site,
    method: Method,
    stats: Stats,
    pattern: Pattern,
    probe: Tensor | None,
) -> SiteReport:
    """Prune one site in place: `target`, in the dtype it is stored in, and `site`, on which the stream goes on.

    What is pruned is the stored weight, whatever dtype the forward passes use. Raises NonFinite.
    """
    dense = target.weight.to(site.stored.device, torch.float32, copy=True)
    pruned = method.prune(dense, stats, pattern.within(method.group))
    stored = pruned.weight.to(target.stored.dtype)
    if not stored.isfinite().all():
        raise NonFinite(f"The pruned weights of {name} do not fit {stored.dtype}. Use another method, or --skip it.")
    target.put(stored)
    site.put(stored)
    error = None
    if probe is not None:
        probe = probe.to(dense.device)
        change = (probe @ (dense - stored.float()).T).square().sum()
        error = (change / (probe @ dense.T).square().sum().clamp_min(1e-30)).item()
    zeros = (stored == 0).sum().item() / stored.numel()
    rows, columns = dense.shape
    return SiteReport(name, (rows, columns), str(pattern), zeros, error, pruned.note)


def site_shapes(language_model: LanguageModel) -> dict[str, tuple[int, int]]:
    """`[out, in]` of every site by full name."""
    return {
        f"{language_model.block_name(index)}.{name}": (site.weight.shape[0], site.weight.shape[1])
        for index, block in enumerate(language_model.blocks)
        for name, site in sites(block).items()
    }


def _report(
    language_model: LanguageModel, method: str, pattern: Pattern, windows: Windows, allow_low_coverage: bool
) -> Report:
    """The report of a run that is about to start. Raises UnsupportedModel for too low a coverage."""
    counts = [coverage(block) for block in language_model.blocks]
    share = sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)
    if share < MINIMUM_COVERAGE and not allow_low_coverage:
        raise UnsupportedModel(
            f"Only {share:.1%} of the block weights of {type(language_model.model).__name__} are prunable matrices; "
            f"{MINIMUM_COVERAGE:.0%} are wanted, since {pattern} of those would be less of the model than it says. "
            "Allow it with --allow-low-coverage."
        )
    return Report(method, str(pattern), pattern.kind, 0.0, share, [], Seconds(), None, windows.fingerprint())


def _refuse_non_finite(step: Step, original: dict[str, Site]) -> None:
    for name, site in original.items():
        if not site.stored.isfinite().all():
            raise NonFinite(f"The weights of {step.name}.{name} hold NaN or Inf. Fetch the checkpoint again.")
