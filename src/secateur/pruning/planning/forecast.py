"""What a run will take, said before any work: from config.json alone, without the weights.

    outline (what the model is and does) · passes (what the method does)
                                         · memory (what is held when) → `Forecast`

Bytes and operations are counted, and memory is a sum of what is held at the worst moment. Seconds
are an estimate: the operations over the rate of matrix products on this machine, measured in less
than a second. What that leaves out stands in `left_out`. Structures make another model by another
program and are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from secateur.checkpoints.folder import is_whole, stored_dtype
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, readable_checkpoint
from secateur.errors import BadPattern, NotEnoughText, UnsupportedModel
from secateur.methods import find_method
from secateur.methods.pattern_text import parse
from secateur.methods.patterns import Pattern
from secateur.methods.structures import Structure
from secateur.methods.values import AS_STORED, parse_values
from secateur.models.context import check_length, context
from secateur.models.load import checkpoint_config, described_config, locate
from secateur.models.mapped_experts import too_large
from secateur.models.matrices import matrix_shapes, model_coverage
from secateur.models.stream.distil import check_windows_for_tuning, refuse_said_to_share
from secateur.models.stream.steps import batch_of_a_step
from secateur.pruning.check import find_zeros
from secateur.pruning.planning.allocation import uniform
from secateur.pruning.planning.drawing import CHARACTERS_A_TOKEN, TextForecast, text_forecast
from secateur.pruning.planning.memory import (
    TUNED_BYTES,
    UNKNOWN_COST,
    Moment,
    arrange,
    as_it_fits,
    filed_bytes,
    tuning_moment,
    with_tuning,
    without_forecast,
)
from secateur.pruning.planning.outline import build
from secateur.pruning.planning.passes import (
    MODES,
    Operations,
    Workload,
    operations,
    rates,
    seconds_of,
)
from secateur.system.devices import Resources, calibration_dtype, find_resources
from secateur.system.settings import CalibrationText, Compute, Recipe, Trust, taken
from secateur.system.sizes import in_words

LEFT_OUT = (
    "Seconds are operations over the rate of products alone: no scores, masks, norms and other "
    "passes over elements, no steps that wait for one another (a column sweep takes several times "
    "its operations), no reading and writing of files, no loading, no drawing of text from files.",
    "Memory is tensors and two constants, for the process and for what the allocator keeps: from "
    "4 % less to 27 % more than what was measured.",
)


@dataclass(frozen=True)
class Forecast:
    """What a run will take; `memory`, `operations` and `seconds` by "one" and "two" passes.

    `passes` is the way that was asked for or chosen; `fits`, whether it stays within
    `memory_limit`, None without one. `text`: what the calibration text takes before the first
    block, None where that is not known. `checkpoint_bytes` are exact where `exact`, else parameters
    times the width of the dtype. `seconds` is None where nothing was measured. A method whose cost
    is not known (`Method.cost`) leaves `memory` and `operations` empty, `fits` and `seconds` None.
    `left_out` says in sentences what the figures do not count.
    """

    model: str
    architecture: str
    method: str
    pattern: str
    values: str
    samples: int
    seq_len: int
    batch_size: int
    device: str
    forward_dtype: str
    stored_dtype: str
    parameters: int
    blocks: int
    sites: int
    pruned_sites: int
    coverage: float
    checkpoint_bytes: int
    exact: bool
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    spill_bytes: int
    memory: dict[str, Moment]
    memory_limit: int | None
    passes: str
    fits: bool | None
    operations: dict[str, Operations]
    rates: dict[str, float]
    seconds: dict[str, float] | None
    text: TextForecast | None
    left_out: tuple[str, ...]


def forecast(
    model: str | Path | None = None,
    *,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    values: str = Recipe.values,
    samples: int = CalibrationText.samples,
    seq_len: int | None = CalibrationText.seq_len,
    calibration: str | None = CalibrationText.calibration,
    data_dir: str | Path | None = CalibrationText.data_dir,
    self_tokens: int = CalibrationText.self_tokens,
    skip: Sequence[str] = Recipe.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: int | str | None = Compute.memory,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    measure: bool = True,
) -> Forecast:
    """Say what pruning a model will take, from its config.json; arguments as for `prune`.

    Weights are never loaded: `model` is a folder or a hub name, of which only small files are
    fetched; headers of shards are used where they lie there. `passes`: whether a block runs once,
    with every batch waiting inside it (`one`), or is looked at first (`two`); `auto` takes `one`
    where all fits into `memory`. Without `measure` no rate is measured and no seconds are said.
    Raises BadPattern for structures, and SecateurError as `prune` does.
    """
    recipe, text = taken(Recipe, locals()), taken(CalibrationText, locals())
    resources, trust = find_resources(taken(Compute, locals())), taken(Trust, locals())
    return _forecast(model, recipe, text, resources, trust, measure)


def _forecast(
    model: str | Path | None,
    recipe: Recipe,
    text: CalibrationText,
    resources: Resources,
    trust: Trust,
    measure: bool,
) -> Forecast:
    work, size, exact = _workload(model, recipe, text, resources, trust)
    passes, limit, batch = resources.passes, resources.limit, work.batch
    known = work.method.cost is not None
    way = arrange(work, batch, passes, limit) if known else without_forecast(passes, limit, batch)
    work = as_it_fits(replace(work, batch=way.batch), limit)
    flops = {mode: operations(work, mode) for mode in MODES if known}
    speeds = rates(work.devices[0], work.forward) if measure and known else {}
    seconds = {mode: seconds_of(done, speeds).total for mode, done in flops.items() if speeds}
    drawn = _text(work, text, model, resources, measure=measure)
    before = drawn.memory.bytes if drawn else 0
    peak = way.peaks.get(way.passes)
    spilled = way.spill * peak.parts["hidden states"] if peak else 0
    together = tuning_moment(work) if known else None
    filed = filed_bytes(work, together, limit)
    blocks, shapes = work.built.blocks, matrix_shapes(work.built)
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    changed = sum(prod(shapes[name]) for name in work.planned)
    return Forecast(
        model=str(model or "demo"),
        architecture=type(work.built.model).__name__,
        method=recipe.method,
        pattern=str(parse(recipe.pattern)),
        values=str(parse_values(recipe.values) or AS_STORED),
        samples=text.samples,
        seq_len=work.length,
        batch_size=way.batch,
        device=",".join(map(str, work.devices)),
        forward_dtype=str(work.forward).removeprefix("torch."),
        stored_dtype=str(work.stored).removeprefix("torch."),
        parameters=work.built.model.num_parameters(),
        blocks=len(blocks),
        sites=len(shapes),
        pruned_sites=len(work.planned),
        coverage=model_coverage(work.built),
        checkpoint_bytes=size,
        exact=exact,
        # the check at load, the copy, every block, and the digests of source and result
        bytes_read=4 * size + in_blocks * work.stored.itemsize,
        bytes_written=size + changed * work.stored.itemsize,
        disk_bytes=size + (2 * TUNED_BYTES * in_blocks if work.method.distil else 0),
        spill_bytes=max(spilled, filed) + work.spilled * work.stacked_bytes,
        memory=with_tuning(way.peaks, together),
        memory_limit=limit,
        passes=way.passes,
        fits=_fits(limit, before, _rest(peak, spilled), _rest(together, filed)),
        operations=flops,
        rates=speeds,
        seconds=seconds or None,
        text=drawn,
        left_out=tuple(_left_out(work, recipe.method, drawn)),
    )


def _rest(moment: Moment | None, filed: int) -> int | None:
    """What a moment holds besides so many bytes in files."""
    return moment and moment.bytes - filed


def _fits(limit: int | None, before: int, peak: int | None, together: int | None) -> bool | None:
    """Whether every moment stays within a limit; None without one, or where nothing is known."""
    return None if limit is None or peak is None else max(before, peak, together or 0) <= limit


def _text(
    work: Workload,
    text: CalibrationText,
    model: str | Path | None,
    resources: Resources,
    *,
    measure: bool,
) -> TextForecast | None:
    """What the calibration text takes; None where the model would make it and cannot be run without
    numbers.
    """
    try:
        return text_forecast(work, text, model, resources, measure=measure)
    except UnsupportedModel:
        return None


def _workload(
    model: str | Path | None,
    recipe: Recipe,
    text: CalibrationText,
    resources: Resources,
    trust: Trust,
) -> tuple[Workload, int, bool]:
    """(the run, bytes of the checkpoint, whether they are exact). Refuses what `prune` would."""
    pattern, method = _zeros(recipe.pattern), find_method(recipe.method)
    zeros = find_zeros(recipe, method, pattern, parse_values(recipe.values))
    remote = trust.trust_remote_code
    batch = min(text.samples, resources.batch_size)
    if batch < 1:
        raise NotEnoughText(
            f"At least one window a batch is needed; found {text.samples} windows in batches of "
            f"{resources.batch_size}."
        )
    devices = resources.devices
    folder = locate(model, trust, weights=False)
    checkpoint = readable_checkpoint(folder) if folder.is_file() or is_whole(folder) else None
    decoded = isinstance(checkpoint, DecodedCheckpoint)
    if checkpoint:
        config = checkpoint_config(checkpoint, trust_remote_code=remote)
    else:
        config = described_config(folder, trust_remote_code=remote)
    length = text.seq_len or min(2048, context(config) or 2048)
    check_length(config, length)
    stored = getattr(config, "dtype", None) or torch.float32
    if checkpoint:
        stored = torch.bfloat16 if decoded else stored_dtype(checkpoint)
    forward = calibration_dtype(resources.dtype, devices[0], stored) or stored
    built = build(config, forward, trust_remote_code=remote)
    size = checkpoint.bytes if checkpoint else built.model.num_parameters() * stored.itemsize
    shapes = matrix_shapes(built)
    planned = uniform(shapes, pattern, recipe.skip)
    zeros.check_groups(planned, shapes)
    if zeros.method.distil and not zeros.method.distil_if_it_fits:
        check_windows_for_tuning(text.samples)
        refuse_said_to_share(built)
    work = Workload(
        built=built,
        method=zeros.method,
        planned=planned,
        samples=text.samples,
        length=length,
        forward=forward,
        stored=stored,
        devices=devices,
        spilled=too_large(size, resources.limit),
        batch=batch_of_a_step(text.samples, length, batch) if zeros.method.refine else batch,
    )
    return work, size, checkpoint is not None


def _zeros(pattern: str) -> Pattern:
    """The pattern of zeros of that name. Raises BadPattern for a structure."""
    chosen = parse(pattern)
    if isinstance(chosen, Structure):
        raise BadPattern(
            f"{chosen} makes a smaller model, and what that takes is not forecast: which parts go "
            "is known only when the model is there. Say '50%' or '2:4', which bound the memory of "
            "one block from above."
        )
    return chosen


def _left_out(work: Workload, method: str, text: TextForecast | None) -> Iterator[str]:
    """What the figures of this forecast do not count."""
    kinds = work.outline.kinds
    yield from LEFT_OUT
    if unseen := sorted({name for kind in kinds for name in kind.unseen}):
        yield (
            "Not reached by a forward pass, so not solved where a method needs inputs: "
            f"{', '.join(unseen)}."
        )
    if any(read.share < 1 for kind in kinds for read in kind.reads):
        yield (
            "Experts are taken to see even shares of the tokens; one that sees more holds more for "
            "a moment."
        )
    if work.method.permute:
        yield (
            "+permute traces one block of each kind and compares it afterwards; that is not "
            "counted."
        )
    if work.method.distil_if_it_fits and not work.method.distil:
        yield "All blocks cannot be tuned together, and the run does without."
    if work.method.distil:
        yield (
            "+distil keeps the graphs of blocks in half of the memory that is free, and computes "
            "the others twice; its state on disk is twice what all blocks take."
        )
    if len(work.devices) > 1:
        yield (
            "Of several devices the first is counted, which holds what is merged; seconds are "
            "those of one."
        )
    if work.method.cost is None:
        yield UNKNOWN_COST.format(method)
    if text is None:
        yield "What the model takes to answer prompts is not known without its numbers."
    elif text.tokens:
        yield (
            f"Answers are taken to be as long as --self-tokens allow, prompts to have a token for "
            f"{CHARACTERS_A_TOKEN} characters; shorter answers are more of them."
        )


def lines(forecast: Forecast) -> list[str]:
    """The forecast in words, a line each."""
    fits, limit = "", _gb(forecast.memory_limit or 0).strip()
    if forecast.fits is not None:
        fits = f", which {'fits' if forecast.fits else 'does not fit'} into {limit}"
    return [
        *_run_lines(forecast),
        *(_memory_line(mode, moment) for mode, moment in forecast.memory.items()),
        *_text_lines(forecast.text),
        *_work_lines(forecast),
        "",
        f"Blocks run in {forecast.passes} pass{'es' * (forecast.passes == 'two')}{fits}.",
        *forecast.left_out,
    ]


def _run_lines(forecast: Forecast) -> list[str]:
    """The model, the run and the disk."""
    rounded = "" if forecast.values == AS_STORED else f" and {forecast.values}"
    source = "as their headers say" if forecast.exact else "as the configuration says"
    return [
        f"{forecast.architecture}: {forecast.parameters / 1e9:.4g} B parameters in "
        f"{forecast.stored_dtype}, {forecast.blocks} blocks, {forecast.sites} weight matrices that "
        f"hold {forecast.coverage:.1%} of the block weights.",
        f"Pruning {forecast.pruned_sites} of them with {forecast.method} to {forecast.pattern}"
        f"{rounded}: "
        f"{forecast.samples} windows of {forecast.seq_len} tokens in batches of "
        f"{forecast.batch_size}, {forecast.forward_dtype} on {forecast.device}.",
        "",
        f"read         {_gb(forecast.bytes_read)}, weights {source}: checked at load, copied, run, "
        "and digested twice",
        f"written      {_gb(forecast.bytes_written)}, a copy of the weights and what changed in it",
        f"disk needed  {_gb(forecast.disk_bytes)} for the result, "
        f"{_gb(forecast.spill_bytes).strip()} for what does not fit into memory",
    ]


def _memory_line(mode: str, moment: Moment) -> str:
    device = f", {_gb(moment.on_device).strip()} of it on the device" if moment.on_device else ""
    parts = sorted(moment.parts.items(), key=lambda part: -part[1])[:4]
    most = ", ".join(f"{name} {_gb(size).strip()}" for name, size in parts)
    return f"memory, {mode}  {_gb(moment.bytes)} at most{device}, when {moment.when}: {most}"


def _text_lines(text: TextForecast | None) -> Iterator[str]:
    """What the calibration text takes."""
    if text is None:
        return
    yield _memory_line("text", text.memory)
    if text.tokens:
        seconds = "" if text.seconds is None else f", estimated {_span(text.seconds)}"
        yield (
            f"work, text    up to {text.tokens:,} tokens that the model says, {text.batch_size} "
            f"prompts at once{seconds}"
        )


def _work_lines(forecast: Forecast) -> Iterator[str]:
    for mode, work in forecast.operations.items():
        seconds = f", estimated {_span(forecast.seconds[mode])}" if forecast.seconds else ""
        yield (
            f"work, {mode}    {work.total / 1e15:10.4g} Pflop: forward {work.forward / 1e15:.3g}, "
            f"statistics {work.statistics / 1e15:.3g}, solving {work.solve / 1e15:.3g}{seconds}"
        )
    speeds = [f"{rate / 1e9:.0f} Gflop/s in {name}" for name, rate in forecast.rates.items()]
    if speeds:
        yield (
            f"{'':13}estimated: operations over the rate of products here and now, "
            f"{', '.join(speeds)}"
        )


def _gb(size: int) -> str:
    return in_words(size, ("GB", "MB") if size else ("GB",), "10.4g")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
