"""The peak memory of a run, added up from what is alive at each of its moments, and the way through
the blocks that stays within a limit.

    process · calibration tokens · hidden states of all batches · the block, in the dtype of the
    forward passes and as it is stored · what a batch has alive within the block · statistics · what
    the solver works with

`two` passes: one looks, the next goes on; between them nothing of a batch but its hidden state is
held. `one` pass: every batch waits within the block while a group of weight matrices is solved,
with all that it has alive there. Everything is a sum of tensors that the code makes at that moment;
three things are constants: `PROCESS_BYTES`, `ALLOCATOR_BYTES` and the working memory of the
methods, which is measured (`cost.Cost`).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import torch

from secateur.errors import NotEnoughText, UnsupportedModel
from secateur.kernels.gram import TOKENS_AT_A_TIME, panel_width
from secateur.methods import Method
from secateur.models.context import vocabulary_size, width
from secateur.models.mapped_tensors import hidden_bytes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import PROBE_TOKENS, BlockRun
from secateur.models.stream.distil import LOGITS, check_windows_for_tuning, refuse_said_to_share
from secateur.models.stream.steps import section_length, step_windows
from secateur.pruning.planning.outline import Kind, Read, build
from secateur.pruning.planning.passes import MODES, Mode, Workload, needs_dense
from secateur.system.memory import anonymous_bytes, available_bytes
from secateur.system.sizes import in_words

PLENTY = 200
"""A run fits for certain where so many times its hidden states and its largest block do."""

PROCESS_BYTES = 360 * 10**6
"""Python, torch, transformers and datasets, used once: 353 to 363 MB with a model of 4 MB."""
TUNED_BYTES = 4 * 3
"""Of each weight of all blocks while `+distil` tunes: itself and Adam's two means, in float32."""
UNKNOWN_COST = (
    "Method {!r} does not say what it costs, so memory, operations and seconds are not forecast; "
    "under a memory limit blocks run in two passes. State it as the method's `cost` "
    "(docs/adding-a-method.md)."
)
ALLOCATOR_BYTES = 160 * 2**20
"""What glibc keeps of freed memory: blocks of up to 32 MiB come from its heap, which may have 64
MiB free at its top (mallopt(3): DEFAULT_MMAP_THRESHOLD_MAX, and M_TRIM_THRESHOLD twice as large),
and holes below, here three of 32 MiB. Measured: 110 to 150 MB for matrices of 8 to 45 MB. It does
not grow with the model.
"""


@dataclass(frozen=True)
class Moment:
    """What a run holds at its worst moment, `when` that is: `parts` in bytes by name, and their
    sum.

    `on_device` is the part that lies on the accelerator where there is one; the rest is memory of
    the machine.
    """

    when: str
    parts: dict[str, int]
    bytes: int
    on_device: int


class Arrangement(NamedTuple):
    """How blocks are gone through: in "one" pass or "two", in batches of `batch` windows.

    `spill`: hidden states lie in a file. `peaks` by passes, with such batches and hidden states in
    memory.
    """

    passes: str
    spill: bool
    batch: int
    peaks: dict[str, Moment]


def arrange(work: Workload, batch: int, passes: str, limit: int | None) -> Arrangement:
    """The way to stay within `limit` bytes, if there is one; `passes` may name it, or be "auto".

    What costs least comes first: one pass in batches of `batch` windows, in smaller ones, two
    passes, hidden states in a file. Activations that wait within a block cannot go to a file.
    """
    modes = [mode for mode in MODES if passes in (mode, "auto")]
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)

    @cache
    def peaks(size: int) -> dict[str, Moment]:
        return {mode: worst(replace(work, batch=size), mode) for mode in MODES}

    for spill, mode, size in (*product([False], modes, sizes), *product([True], modes[-1:], sizes)):
        peak = peaks(size)[mode]
        if limit is None or peak.bytes - spill * peak.parts["hidden states"] <= limit:
            return Arrangement(mode, spill, size, peaks(size))
    return Arrangement(modes[-1], True, 1, peaks(1))


def without_forecast(passes: str, limit: int | None, batch: int) -> Arrangement:
    """The way where nothing can be forecast: with a `limit`, the one that takes least memory."""
    way = passes if passes != "auto" else "one" if limit is None else "two"
    return Arrangement(way, limit is not None, batch, {})


def way_through(
    run: BlockRun, method: Method, planned: Collection[str], passes: str, limit: int | None
) -> dict[str, Any]:
    """What `arrange` says for a run that prunes the `planned` weight matrices.

    As JSON can hold it: {"passes": "one" or "two", "spill": whether hidden states go to a file,
    "batch_size": windows of a batch, at most that of the run}. Without a limit it is what is free
    on the first device now. Where that is plenty, and where a block cannot be run without numbers,
    nothing is forecast.
    """
    model, batch, (samples, length) = run.language_model, run.batch_size, run.tokens.shape
    stored, devices = model.model.dtype, [*run.devices] * run.ranks.size
    forward = run.dtype or stored
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    free = available_bytes(devices[0]) if limit is None else limit
    if PLENTY * (hidden_bytes(run.tokens.shape, width(model), forward) + largest * 4) < free:
        way = without_forecast(passes, None, batch)
    elif method.cost is None:
        way = without_forecast(passes, limit, batch)
    else:
        try:
            built, spilled = build(model.model.config, forward), model.spilled
            work = Workload(
                built, method, planned, samples, length, forward, stored, devices, spilled
            )
            way = arrange(work, min(batch, samples), passes, free)
        except UnsupportedModel:
            way = without_forecast("two" if passes == "auto" else passes, limit, batch)
    return {"passes": way.passes, "spill": way.spill, "batch_size": way.batch}


def free_bytes(device: torch.device, limit: int | None) -> int:
    """What is free on a device: of a `limit`, what is not used of it yet."""
    free = available_bytes(device)
    if limit is None:
        return free
    used = anonymous_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    return max(min(free, limit - (used or 0)), 0)


def tuned_bytes(language_model: LanguageModel) -> int:
    """What all blocks with Adam's means take."""
    parameters = (p for block in language_model.blocks for p in block.parameters())
    return TUNED_BYTES * sum(p.numel() for p in parameters)


def tuned_in_file(language_model: LanguageModel, device: torch.device, limit: int | None) -> bool:
    """Whether all blocks with Adam's means are more than memory holds, and lie in a mapped file.

    Raises UnsupportedModel where they do not fit on a device that maps no files.
    """
    needed = tuned_bytes(language_model)
    if needed <= (free := free_bytes(device, limit)):
        return False
    if device.type == "cpu":
        return True
    wanted, found = (in_words(count, ("GiB", "MiB"), least=1 / 8) for count in (needed, free))
    raise UnsupportedModel(
        f"+distil tunes all blocks at once, which takes {wanted} and more on {device}; found "
        f"{found}. Use --device cpu, where they lie in a file if memory is short, leave +distil "
        "out, or use +refine, which holds one block."
    )


_IN_HOST_MEMORY = (
    "process",
    "allocator",
    "calibration tokens",
    "weights that the loader stacks",
    "block as stored",
)
_IN_FILE = ("all blocks", "masks", "dense hidden states")
"""Of what tuning all blocks takes, the parts that lie in a mapped file where memory is short."""
Parts = dict[str, float]


def worst(work: Workload, mode: Mode) -> Moment:
    """The moment at which a run holds most."""
    moments: list[Moment] = []
    for kind in work.outline.kinds:
        moments += [_moment(work, when, sizes) for when, sizes in _moments(work, mode, kind)]
    return max(moments, key=lambda moment: moment.bytes)


def _moment(work: Workload, when: str, sizes: Parts) -> Moment:
    parts = {name: int(size) for name, size in sizes.items() if size}
    total, in_host = sum(parts.values()), sum(parts.get(name, 0) for name in _IN_HOST_MEMORY)
    return Moment(when, parts, total, 0 if work.on_host else total - in_host)


def _moments(work: Workload, mode: Mode, kind: Kind) -> Iterator[tuple[str, Parts]]:
    """(when, bytes that are alive by name) for the moments of one block."""
    method, need, outline = work.method, work.method.need, work.outline
    dense = needs_dense(method)
    running = _running(work, kind)
    hidden = running["hidden states"] / (1 + dense)
    reads = [read for read in kind.reads if work.rows(kind, read)]
    at_block = running | {
        "block as stored": (1 + method.permute)
        * (kind.parameters * work.stored.itemsize + kind.buffer_bytes),
        "probes": sum(4 * read.columns * work.probe_tokens(read) for read in reads),
    }
    groups: dict[str, list[Read]] = {}
    for read in reads:
        groups.setdefault(read.group, []).append(read)
    if mode == "one":
        turns, busy = list(groups.values()), 0
        batches = ceil(work.windows / work.batch) / len(work.devices) * (1 + dense)
        waiting = [batches * max(read.live_bytes for read in turn) for turn in turns]
    else:
        turns = list(groups.values()) if method.sequential else [reads]
        busy, waiting = kind.held_bytes * (1 + ("cross" in need)), [0.0] * len(turns)
    for turn, size in zip(turns, waiting, strict=True):
        solved = at_block | {"waiting activations": size, "statistics": _statistics(work, turn)}
        adding = max((_adding(work, read) for read in turn), default=0) if need else 0
        looked = {"activations of the batch at hand": busy, "adding statistics": adding}
        yield "looking at inputs", solved | looked
        yield "solving", solved | {"solver": _solving(work, turn)}
    going = {"activations of the batch at hand": kind.peak_bytes + outline.hidden_bytes}
    if mode == "one":
        most = max(waiting, default=0)
        yield "going on", at_block | {"waiting activations": most} | going
    else:
        yield "going on", running | {"targets": hidden if dense else 0} | going
    if method.refine:
        # float32: the tuned copy, its start, gradient, Adam's two and one temporary; a byte for the
        # mask
        tuned = {"tuned block": 25 * kind.parameters, "targets": hidden}
        tuning = {"activations of the batch at hand": kind.tuning_bytes + outline.hidden_bytes}
        yield "refining", running | tuned | at_block | tuning


def tuning_moment(work: Workload) -> Moment | None:
    """The moment at which `+distil` tunes all blocks together, and one of them has its graph; None
    without it. Graphs that stay take half of what is free besides, not more.
    """
    if not work.method.distil:
        return None
    outline, forward = work.outline, work.forward.itemsize
    tokens = step_windows(work.length) * section_length(work.length)
    step = tokens / (work.length * work.batch)
    whole = max(step, 1 / work.batch)  # windows that judge are not cut
    weights = sum(one.count * one.parameters for one in outline.kinds)
    borders = sum(one.count for one in outline.kinds) + 2
    vocabulary = vocabulary_size(work.built.model)
    logits = min(LOGITS, work.length * vocabulary)
    parts: Parts = {
        "process": PROCESS_BYTES,
        "allocator": ALLOCATOR_BYTES,
        "calibration tokens": 8 * work.samples * work.length,
        "all blocks": TUNED_BYTES * weights,
        "masks": weights,
        "gradients": 4 * max(kind.parameters for kind in outline.kinds),
        "dense hidden states": outline.hidden_bytes * work.samples / work.batch,
        "hidden states": outline.hidden_bytes * max(step * borders, 2 * whole),
        "activations of the batch at hand": max(
            max(step * one.tuning_bytes, whole * one.peak_bytes) for one in outline.kinds
        ),
        "output embedding": forward * vocabulary * width(work.built),
        "logits": logits * (16 + 3 * forward),
    }
    return _moment(work, "tuning all blocks", parts)


def as_it_fits(work: Workload, limit: int | None) -> Workload:
    """The run without tuning all blocks together, where a method does without and cannot have it:
    with one window, where blocks share keys and values, or on a device that does not hold them.
    """
    if not work.method.distil_if_it_fits:
        return work
    try:
        check_windows_for_tuning(work.samples)
        refuse_said_to_share(work.built)
        tuned_in_file(work.built, work.devices[0], limit)
    except (NotEnoughText, UnsupportedModel):
        return replace(work, method=work.method._replace(distil=0))
    return work


def filed_bytes(work: Workload, together: Moment | None, limit: int | None) -> int:
    """What of that moment lies in a mapped file, because the rest alone is within the limit."""
    if together is None or limit is None or together.bytes <= limit or not work.on_host:
        return 0
    return sum(together.parts.get(name, 0) for name in _IN_FILE)


def with_tuning(peaks: dict[str, Moment], together: Moment | None) -> dict[str, Moment]:
    """The worst moments by passes, where one may be that of tuning all blocks."""
    moments = [together] if together else []
    return {
        mode: max([peak, *moments], key=lambda moment: moment.bytes) for mode, peak in peaks.items()
    }


def _running(work: Workload, kind: Kind) -> Parts:
    """What is alive all the while that a block is at hand."""
    outline, copies = work.outline, 1 + needs_dense(work.method)
    block = kind.parameters * work.forward.itemsize + kind.buffer_bytes
    hidden = outline.hidden_bytes * work.windows / work.batch / len(work.devices)
    return {
        "process": PROCESS_BYTES,
        "allocator": ALLOCATOR_BYTES,
        "calibration tokens": 8 * work.windows * work.length,
        "weights that the loader stacks": 0 if work.spilled else work.stacked_bytes,
        "masks and rotary tables": outline.call_bytes,
        "hidden states": hidden * copies,
        "block": block * copies,
        "next block": 0 if work.on_host else block,
    }


def _matrices(work: Workload) -> int:
    """How many statistics `[in, in]` the method needs."""
    return len(work.method.need & {"gram", "cross"})


def _statistics(work: Workload, reads: Sequence[Read]) -> float:
    """Sums in float64, `[in, in]` and `[in]`."""
    return sum(8 * _matrices(work) * read.columns**2 + 8 * read.columns for read in reads)


def _adding(work: Workload, read: Read) -> float:
    """In C the columns of some tokens; in torch a product, and inputs once more in float32."""
    matrices, tokens = _matrices(work), work.batch * work.length * read.share
    if work.on_host and (width := panel_width(work.forward)):
        return matrices * min(tokens, TOKENS_AT_A_TIME) * read.columns * width
    copied = 0 if work.forward.itemsize == 4 else 4 * tokens * read.columns * max(matrices, 1)
    return copied + (4 * read.columns**2 if matrices else 24 * PROBE_TOKENS * read.columns)


def _solving(work: Workload, reads: Sequence[Read]) -> float:
    """What a method keeps of every input, and the most that it works with for one of them."""
    cost = work.cost
    kept = sum(cost.kept_bytes(read.columns) for read in reads)
    return kept + max(
        (_workspace(work, read) - cost.kept_bytes(read.columns) for read in reads), default=0
    )


def _workspace(work: Workload, read: Read) -> float:
    """The weights in float32, once more where several are solved as one, and the solver."""
    solves, outputs = "gram" in work.method.need, read.rows.values()
    together = solves and work.method.row_wise
    rows = sum(outputs) if together else max(outputs)
    incoming = sum(outputs) if solves else rows
    joined = rows if together and len(outputs) > 1 else 0
    return 4 * read.columns * (incoming + joined) + work.cost.workspace_bytes(rows, read.columns)
