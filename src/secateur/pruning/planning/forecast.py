"""What a run will take, said before any work: from config.json alone, without the weights.

    outline (what the model is and does) · cost (what the method does) · footprint (what is held when) → `Forecast`

Bytes and operations are counted, and memory is a sum of what is held at the worst moment. Seconds
are an estimate: the operations over the rate of matrix products on this machine, measured in less
than a second. What that leaves out stands in `left_out`. Structures make another model by another
program and are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.checkpoints.folder import INDEX, is_whole, open_checkpoint, stored_dtype
from secateur.errors import BadPattern, NotEnoughText
from secateur.kernels.gram import add_products
from secateur.methods import Method, find_method
from secateur.methods.cost import Cost
from secateur.methods.patterns import Pattern, parse
from secateur.methods.structures import Structure
from secateur.models.context import check_length, context
from secateur.models.load import load_config, resolve
from secateur.models.mapped_experts import too_large
from secateur.pruning.planning.allocation import uniform
from secateur.pruning.planning.memory import (
    UNKNOWN_COST,
    Load,
    Moment,
    arrange,
    check_passes,
    loads,
    probe_tokens,
    without_forecast,
)
from secateur.pruning.planning.outline import Outline, build
from secateur.pruning.planning.passes import MODES, Mode
from secateur.pruning.planning.passes import passes as passes_of
from secateur.system.clock import best_seconds
from secateur.system.devices import calibration_dtype, find_devices, find_dtype
from secateur.system.machine import matrix_rate, square_side
from secateur.system.settings import CalibrationText, Compute, Recipe, Trust
from secateur.system.sizes import find_size, in_words

GRAM = "Gram matrices"
"""What their rate is called: two operations for each product of two inputs, though half of them are
not computed.
"""
LEFT_OUT = (
    "Seconds are operations over the rate of products alone: no scores, masks, norms and other passes over elements, "
    "no steps that wait for one another (a column sweep takes several times its operations), no reading and writing "
    "of files, no loading, no drawing of the calibration text.",
    "Memory is tensors and two constants, for the process and for what the allocator keeps: from 4 % less to 27 % more "
    "than what was measured.",
)


@dataclass(frozen=True)
class Operations:
    """Operations of a run in its three parts; a multiplication and an addition are two.

    `solve` includes the output errors that are reported.
    """

    forward: float
    statistics: float
    solve: float

    @property
    def total(self) -> float:
        return self.forward + self.statistics + self.solve


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Bytes, operations and seconds; `memory`, `operations` and `seconds` by
    "one" and "two".

    `passes` is the way that was asked for or chosen; `fits`, whether it stays within
    `memory_limit`, None without one. `checkpoint_bytes` are exact where `exact`, else parameters
    times the width of the dtype. `seconds` is None where nothing was measured. A method whose cost
    is not known (`Method.cost`) leaves `memory` and `operations` empty, `fits` and `seconds` None.
    `left_out` says in sentences what the figures do not count.
    """

    model: str
    architecture: str
    method: str
    pattern: str
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
    left_out: tuple[str, ...]


def forecast(
    model: str | Path | None = None,
    *,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    samples: int = CalibrationText.samples,
    seq_len: int | None = CalibrationText.seq_len,
    skip: Sequence[str] = Recipe.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: int | str | None = Compute.memory,
    trust_remote_code: bool = Trust.trust_remote_code,
    measure: bool = True,
) -> Forecast:
    """What pruning a model will take, from its config.json; weights are never loaded. Arguments as
    for `prune`.

    `model` is a folder or a hub name, of which only small files are fetched; headers of shards are
    used where they lie there. `passes`: whether a block runs once, with every batch waiting inside
    it (`one`), or is looked at first (`two`); `auto` takes `one` where all fits into `memory`,
    bytes or text such as '16GB'. Without `measure` no rate is measured and no seconds are said.
    Raises BadPattern for structures, and SecateurError as `prune` does.
    """
    chosen = _zeros(pattern)
    found_method, limit = find_method(method), find_size(memory)
    costs = found_method.cost
    check_passes(passes)
    if min(samples, batch_size) < 1:
        raise NotEnoughText(
            f"At least one window a batch is needed; found {samples} windows in batches of {batch_size}."
        )
    devices, name = find_devices(device), find_dtype(dtype)
    folder = resolve(model, ("config.json", INDEX, *(("*.py",) if trust_remote_code else ())))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    length = seq_len or min(2048, context(config) or 2048)
    check_length(config, length)
    checkpoint = open_checkpoint(folder) if is_whole(folder) else None
    stored = (
        stored_dtype(checkpoint) if checkpoint else getattr(config, "dtype", None) or torch.float32
    )
    forward = calibration_dtype(name, devices[0], stored) or stored
    built = build(config, forward, trust_remote_code=trust_remote_code)

    whole = (
        checkpoint.bytes
        if checkpoint
        else sum(p.numel() for p in built.parameters()) * stored.itemsize
    )
    spilled = too_large(whole, limit)

    at = loads(
        built,
        samples,
        length,
        found_method,
        forward=forward,
        stored=stored,
        devices=len(devices),
        host=devices[0].type == "cpu",
        spilled=spilled,
    )
    most = min(batch_size, samples)
    planned = uniform(at(most)[0].shapes, chosen, skip)
    if costs:
        way, spill, batch, peaks = arrange(
            at, most, found_method, costs, planned.keys(), passes, limit
        )
    else:
        way, spill, batch, peaks = without_forecast(passes, limit, most)
    found, load = at(batch)
    hidden = peaks[way].parts["hidden states"] if peaks else 0
    operations = {
        mode: _operations(found, load, found_method, costs, mode, planned.keys())
        for mode in MODES
        if costs
    }
    rates = _rates(devices[0], forward) if measure and costs else {}
    size = checkpoint.bytes if checkpoint else found.parameters * stored.itemsize
    in_sites = (
        sum(rows * columns for rows, columns in (found.shapes[name] for name in planned))
        * stored.itemsize
    )
    weights = sum(kind.count * kind.weights for kind in found.kinds)
    return Forecast(
        str(model or "demo"),
        found.architecture,
        method,
        str(chosen),
        samples,
        length,
        batch,
        ",".join(map(str, devices)),
        str(forward).removeprefix("torch."),
        str(stored).removeprefix("torch."),
        found.parameters,
        sum(kind.count for kind in found.kinds),
        len(found.shapes),
        len(planned),
        sum(kind.count * kind.prunable for kind in found.kinds) / max(weights, 1),
        size,
        checkpoint is not None,
        # the check at load, the copy, every block, and the digests of source and result
        4 * size + found.in_blocks * stored.itemsize,
        size + in_sites,
        size,
        hidden * spill + found.restacked * stored.itemsize * spilled,
        peaks,
        limit,
        way,
        None if limit is None or not peaks else peaks[way].bytes - spill * hidden <= limit,
        operations,
        rates,
        {mode: seconds_of(operations[mode], rates).total for mode in MODES} if rates else None,
        (
            *_notes(found, found_method, len(devices)),
            *(() if costs else (UNKNOWN_COST.format(method),)),
        ),
    )


def _zeros(pattern: str) -> Pattern:
    """The pattern of zeros of that name. Raises BadPattern for a structure."""
    chosen = parse(pattern)
    if isinstance(chosen, Structure):
        raise BadPattern(
            f"{chosen} makes a smaller model, and what that takes is not forecast: which parts go is known only when "
            "the model is there. Say '50%' or '2:4', which bound the memory of one block from above."
        )
    return chosen


def _operations(
    found: Outline, load: Load, method: Method, costs: Cost, mode: Mode, planned: Collection[str]
) -> Operations:
    """The operations of all blocks; those of the last are fewer, since nothing comes after it."""
    forward = statistics = solve = 0.0
    for kind in found.kinds:
        often = passes_of(method, kind.groups, mode)
        inner = often.windows(load.windows, load.batch, True) * kind.count
        outer = often.after * load.windows * (kind.count - kind.has_last)
        forward += (kind.flops * (inner + outer) + kind.watch_flops * inner) / load.batch
        if mode == "one" or method.sequential:
            forward += kind.flops  # one batch, to find the stages
        if mode == "one":
            ends = [
                read
                for read in kind.reads
                if read.group == kind.reads[-1].group and read.share == 1
            ]
            if kind.has_last and not method.refine:  # it ends at its last sites
                forward -= sum(
                    2 * load.windows * load.length * read.columns * sum(read.rows.values())
                    for read in ends
                )
        for read in kind.reads:
            rows = [
                size
                for name, size in read.rows.items()
                if f"{found.stack}.{kind.first}.{name}" in planned
            ]
            tokens = load.windows * load.length * read.share
            matrices = ("gram" in method.need) + ("cross" in method.need and read.share == 1)
            statistics += kind.count * matrices * 2 * tokens * read.columns**2
            if rows:
                probe = probe_tokens(load.tokens * read.share)
                errors = (
                    4 * probe * read.columns * sum(rows)
                )  # what the site gives before and after, on the probe
                solve += kind.count * (_solve(costs, method, rows, read.columns) + errors)
    return Operations(forward, statistics, solve)


def _solve(costs: Cost, method: Method, rows: Sequence[int], columns: int) -> float:
    """Sites that read the same input are solved as one where their rows are independent."""
    stacks = [sum(rows)] if method.row_wise and "gram" in method.need else rows
    return costs.shared(columns) + sum(costs.site(stack, columns) for stack in stacks)


def _rates(device: torch.device, forward: torch.dtype) -> dict[str, float]:
    """Operations a second of matrix products in the dtypes of a run and of its Gram matrices,
    measured now.
    """
    kinds = dict.fromkeys((forward, torch.float32))
    rates = {str(kind).removeprefix("torch."): matrix_rate(kind, device) for kind in kinds}
    side = square_side(device)
    x = torch.randn(side, side, dtype=forward, device=device)
    total = torch.zeros(side, side, dtype=torch.float64, device=device)
    return rates | {GRAM: 2 * side**3 / best_seconds(lambda: add_products(total, x, x), device)}


def seconds_of(operations: Operations, rates: Mapping[str, float]) -> Operations:
    """Seconds in place of operations, at the rates that were measured; that of the forward passes
    comes first.
    """
    forward = next(iter(rates.values()))
    return Operations(
        operations.forward / forward,
        operations.statistics / rates[GRAM],
        operations.solve / rates["float32"],
    )


def _notes(found: Outline, method: Method, devices: int) -> tuple[str, ...]:
    """What the figures of this forecast do not count."""
    notes: list[str] = list(LEFT_OUT)
    if unseen := sorted({name for kind in found.kinds for name in kind.unseen}):
        notes.append(
            f"Not reached by a forward pass, so not solved where a method needs inputs: {', '.join(unseen)}."
        )
    if any(read.share < 1 for kind in found.kinds for read in kind.reads):
        notes.append(
            "Experts are taken to see even shares of the tokens; one that sees more holds more for a moment."
        )
    if method.permute:
        notes.append(
            "+permute traces one block of each kind and compares it afterwards; that is not counted."
        )
    if devices > 1:
        notes.append(
            "Of several devices the first is counted, which holds what is merged; seconds are those of one."
        )
    return tuple(notes)


def lines(found: Forecast) -> list[str]:
    """The forecast in words, a line each."""
    source = "as their headers say" if found.exact else "as the configuration says"
    shown = [
        f"{found.architecture}: {found.parameters / 1e9:.4g} B parameters in {found.stored_dtype}, {found.blocks} "
        f"blocks, {found.sites} sites that hold {found.coverage:.1%} of the block weights.",
        f"Pruning {found.pruned_sites} of them with {found.method} to {found.pattern}: {found.samples} windows of "
        f"{found.seq_len} tokens in batches of {found.batch_size}, {found.forward_dtype} on {found.device}.",
        "",
        f"read         {_gb(found.bytes_read)}, weights {source}: checked at load, copied, run, and digested twice",
        f"written      {_gb(found.bytes_written)}, a copy of the weights and what changed in it",
        f"disk needed  {_gb(found.disk_bytes)} for the result, "
        f"{_gb(found.spill_bytes).strip()} for what does not fit into memory",
    ]
    for mode, moment in found.memory.items():
        device = (
            f", {_gb(moment.on_device).strip()} of it on the device" if moment.on_device else ""
        )
        parts = sorted(moment.parts.items(), key=lambda part: -part[1])[:4]
        most = ", ".join(f"{name} {_gb(size).strip()}" for name, size in parts)
        shown.append(
            f"memory, {mode}  {_gb(moment.bytes)} at most{device}, when {moment.when}: {most}"
        )
    for mode, work in found.operations.items():
        seconds = f", estimated {_span(found.seconds[mode])}" if found.seconds else ""
        shown.append(
            f"work, {mode}    {work.total / 1e15:10.4g} Pflop: forward {work.forward / 1e15:.3g}, "
            f"statistics {work.statistics / 1e15:.3g}, solving {work.solve / 1e15:.3g}{seconds}"
        )
    rates = ", ".join(f"{rate / 1e9:.0f} Gflop/s in {name}" for name, rate in found.rates.items())
    if rates:
        shown.append(
            f"{'':13}estimated: operations over the rate of products here and now, {rates}"
        )
    limit = _gb(found.memory_limit or 0).strip()
    fits = (
        ""
        if found.fits is None
        else f", which {'fits' if found.fits else 'does not fit'} into {limit}"
    )
    return [
        *shown,
        "",
        f"Blocks run in {found.passes} pass{'es' * (found.passes == 'two')}{fits}.",
        *found.left_out,
    ]


def _gb(size: int) -> str:
    return in_words(size, ("GB", "MB") if size else ("GB",), "10.4g")


def _span(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds < 120
        else f"{seconds / 60:.3g} min"
        if seconds < 7200
        else f"{seconds / 3600:.3g} h"
    )
