"""The peak memory of a run, added up from what is alive at each of its moments.

    process · calibration tokens · hidden states of all batches · the block, in the dtype of the forward passes and as
    it is stored · what a batch has alive within the block · statistics · what the solver works with

`two` passes: one looks, the next goes on; between them nothing of a batch but its hidden state is
held. `one` pass: every batch waits within the block while a group of sites is solved, with all that
it has alive there. Everything is a sum of tensors that the code makes at that moment; three things
are constants: `PROCESS_BYTES`, `ALLOCATOR_BYTES` and the working memory of the methods, which is
measured (`cost.Cost`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from math import ceil
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from secateur.errors import UnknownName, UnsupportedModel
from secateur.kernels.gram import TOKENS_AT_A_TIME, panel_width
from secateur.methods import Method
from secateur.methods.cost import Cost
from secateur.models.context import width
from secateur.models.mapped_tensors import hidden_bytes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import PROBE_TOKENS
from secateur.pruning.planning.outline import Kind, Outline, Read, build, outline
from secateur.pruning.planning.passes import MODES, Mode, needs_dense
from secateur.system.memory import available_bytes

PLENTY = 200
"""A run fits for certain where so many times its hidden states and its largest block do."""

PROCESS_BYTES = 360 * 10**6
"""Python, torch, transformers and datasets, loaded and used once: 353 to 363 MB after a run on a
model of 4 MB.
"""
UNKNOWN_COST = (
    "Method {!r} does not say what it costs, so memory, operations and seconds are not forecast; under a memory limit "
    "blocks run in two passes. State it as the method's `cost` (docs/adding-a-method.md)."
)
ALLOCATOR_BYTES = 160 * 2**20
"""What glibc keeps of freed memory: blocks of up to 32 MiB come from its heap, which may have 64
MiB free at its top (mallopt(3): DEFAULT_MMAP_THRESHOLD_MAX, and M_TRIM_THRESHOLD twice as large),
and holes below, here three of 32 MiB. Measured: 110 to 150 MB for matrices of 8 to 45 MB. It does
not grow with the model.
"""


@dataclass(frozen=True)
class Moment:
    """What a run holds at its worst moment: bytes by name, in words, and `when` that is; `bytes` is
    their sum.

    `on_device` is the part that lies on the accelerator where there is one; the rest is memory of
    the machine.
    """

    when: str
    parts: dict[str, int]
    bytes: int
    on_device: int


@dataclass(frozen=True)
class Load:
    """What the sums are made of, apart from the model: windows, and how much of them a forward pass
    takes.
    """

    windows: int
    batch: int
    length: int
    forward: torch.dtype
    stored_itemsize: int
    devices: int
    host: bool
    spilled: bool = False
    """Whether weights that the loader stacks lie in a file."""

    @property
    def batches(self) -> int:
        return ceil(self.windows / self.batch)

    @property
    def tokens(self) -> int:
        """Of one batch."""
        return self.batch * self.length


def loads(
    built: PreTrainedModel,
    samples: int,
    length: int,
    method: Method,
    *,
    forward: torch.dtype,
    stored: torch.dtype,
    devices: int,
    host: bool,
    spilled: bool,
) -> Callable[[int], tuple[Outline, Load]]:
    """For batches of so many windows, what they make of a model without weights; found once for
    each size.
    """

    @cache
    def at(batch: int) -> tuple[Outline, Load]:
        found = outline(built, batch, length, tuning=method.refine > 0)
        windows = (
            samples if method.need or method.refine else batch
        )  # else the first batch is all that is run
        return found, Load(windows, batch, length, forward, stored.itemsize, devices, host, spilled)

    return at


class Arrangement(NamedTuple):
    """How blocks are gone through: in "one" pass or "two"; `spill`: hidden states lie in a file;
    windows of a batch.

    `peaks` by passes, with batches of that size and hidden states in memory.
    """

    passes: str
    spill: bool
    batch: int
    peaks: dict[str, Moment]


def arrange(
    at: Callable[[int], tuple[Outline, Load]],
    batch: int,
    method: Method,
    cost: Cost,
    planned: Collection[str],
    passes: str,
    limit: int | None,
) -> Arrangement:
    """The way to stay within `limit` bytes, if there is one; `passes` may name it, or be "auto".
    `at` says what batches of a size make of a model.

    What costs least comes first: one pass in batches of `batch` windows, the same in smaller ones,
    two passes, and hidden states in a file. Activations that wait within a block cannot go to a
    file.
    """
    modes: Sequence[Mode] = (
        MODES if passes == "auto" else [mode for mode in MODES if mode == passes]
    )
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)

    @cache
    def peaks(size: int) -> dict[str, Moment]:
        return {mode: worst(*at(size), method, cost, mode, planned) for mode in MODES}

    for spill, mode, size in (*product([False], modes, sizes), *product([True], modes[-1:], sizes)):
        peak = peaks(size)[mode]
        if limit is None or peak.bytes - spill * peak.parts["hidden states"] <= limit:
            return Arrangement(mode, spill, size, peaks(size))
    return Arrangement(modes[-1], True, 1, peaks(1))


def without_forecast(passes: str, limit: int | None, batch: int) -> Arrangement:
    """The way where nothing can be forecast: what takes least memory if there is a `limit`, and
    what was asked for.
    """
    way = passes if passes != "auto" else "one" if limit is None else "two"
    return Arrangement(way, limit is not None, batch, {})


def check_passes(passes: str) -> None:
    """Raise UnknownName."""
    if passes not in (*MODES, "auto"):
        raise UnknownName("number of passes", passes, (*MODES, "auto"))


def probe_tokens(tokens: float) -> int:
    """Of so many tokens of the first batch, those that the output error is measured on, evenly
    spaced.
    """
    return ceil(tokens / max(ceil(tokens / PROBE_TOKENS), 1))


def worst(
    outline: Outline, load: Load, method: Method, cost: Cost, mode: Mode, planned: Collection[str]
) -> Moment:
    """The moment at which a run holds most; `planned` are the full names of the sites that are
    pruned.
    """
    found: list[Moment] = []
    for kind in outline.kinds:
        start = f"{outline.stack}.{kind.first}."
        reads = [read for read in kind.reads if any(start + name in planned for name in read.rows)]
        for when, parts in _moments(outline, load, kind, reads, method, cost, mode):
            parts = {name: int(size) for name, size in parts.items() if size}
            total = sum(parts.values())
            here = sum(parts.get(name, 0) for name in _OF_HOST)
            found.append(Moment(when, parts, total, 0 if load.host else total - here))
    return max(found, key=lambda moment: moment.bytes)


_OF_HOST = (
    "process",
    "allocator",
    "calibration tokens",
    "weights that the loader stacks",
    "block as stored",
)

Parts = dict[str, float]


def _moments(
    outline: Outline,
    load: Load,
    kind: Kind,
    reads: list[Read],
    method: Method,
    cost: Cost,
    mode: Mode,
) -> Iterable[tuple[str, Parts]]:
    """(when, what is held) for the moments of one block."""
    dense = needs_dense(method)
    matrices = ("gram" in method.need) + ("cross" in method.need)
    hidden = outline.hidden_bytes * load.windows / load.batch / load.devices
    common: Parts = {
        "process": PROCESS_BYTES,
        "allocator": ALLOCATOR_BYTES,
        "calibration tokens": 8 * load.windows * load.length,
        "weights that the loader stacks": 0
        if load.spilled
        else outline.restacked * load.stored_itemsize,
        "masks and rotary tables": outline.call_bytes,
        "hidden states": hidden * (1 + dense),
        "block": (kind.parameters * load.forward.itemsize + kind.buffer_bytes) * (1 + dense),
        "next block": 0
        if load.host
        else kind.parameters * load.forward.itemsize + kind.buffer_bytes,
    }
    stored = (kind.parameters * load.stored_itemsize + kind.buffer_bytes) * (1 + method.permute)

    def sums(some: Iterable[Read]) -> float:
        return sum(8 * matrices * read.columns**2 + 8 * read.columns for read in some)

    def adding(some: Iterable[Read]) -> float:
        return max((_adding(read, load, matrices) for read in some), default=0)

    def solving(some: list[Read]) -> float:
        kept = sum(cost.kept_bytes(read.columns) for read in some)
        return kept + max(
            (_solving(read, method, cost) - cost.kept_bytes(read.columns) for read in some),
            default=0,
        )

    probes = sum(4 * read.columns * probe_tokens(load.tokens * read.share) for read in reads)
    groups: dict[str, list[Read]] = {}
    for read in reads:
        groups.setdefault(read.group, []).append(read)
    turns = list(groups.values())
    busy: Callable[[float], Parts] = lambda size: {"activations of the batch at hand": size}  # noqa: E731

    if mode == "two":
        first = groups.values() if method.sequential else [reads]
        for some in first:
            watched = kind.held_bytes * (1 + ("cross" in method.need))
            at = common | {"block as stored": stored, "probes": probes, "statistics": sums(some)}
            yield (
                "looking at inputs",
                at | busy(watched) | {"adding statistics": adding(some) if method.need else 0},
            )
            yield "solving", at | {"solver": solving(some)}
        targets = hidden if dense else 0
        yield (
            "going on",
            common | {"targets": targets} | busy(kind.peak_bytes + outline.hidden_bytes),
        )
    else:
        waiting = [
            load.batches / load.devices * (1 + dense) * max(r.live_bytes for r in some)
            for some in turns
        ]
        for some, size in zip(turns, waiting, strict=True):
            at = common | {"block as stored": stored, "probes": probes, "waiting activations": size}
            at["statistics"] = sums(some)
            yield (
                "looking at inputs",
                at | {"adding statistics": adding(some) if method.need else 0},
            )
            yield "solving", at | {"solver": solving(some)}
        for before, after in pairwise([0, *waiting, 0]):
            at = common | {
                "block as stored": stored,
                "probes": probes,
                "waiting activations": max(before, after),
            }
            yield "going on", at | busy(kind.peak_bytes + outline.hidden_bytes)
    if method.refine:
        # float32: the tuned copy, its start, gradient, Adam's two and one temporary; a byte for the
        # mask
        tuned = {
            "tuned block": 25 * kind.parameters,
            "targets": hidden,
            "block as stored": stored,
            "probes": probes,
        }
        yield "refining", common | tuned | busy(kind.tuning_bytes + outline.hidden_bytes)


def _adding(read: Read, load: Load, matrices: int) -> float:
    """In C the columns of some tokens, put together; in torch a product, and inputs once more in
    float32.
    """
    tokens = load.tokens * read.share
    if load.host and (width := panel_width(load.forward)):
        return matrices * min(tokens, TOKENS_AT_A_TIME) * read.columns * width
    copied = 0 if load.forward.itemsize == 4 else 4 * tokens * read.columns * max(matrices, 1)
    return copied + (4 * read.columns**2 if matrices else 24 * PROBE_TOKENS * read.columns)


def _solving(read: Read, method: Method, cost: Cost) -> float:
    """The weights in float32, once more on top of each other where several are solved as one, and
    the solver.
    """
    together = "gram" in method.need and method.row_wise
    rows = sum(read.rows.values()) if together else max(read.rows.values())
    incoming = sum(read.rows.values()) if "gram" in method.need else rows
    joined = rows if together and len(read.rows) > 1 else 0
    return 4 * read.columns * (incoming + joined) + cost.workspace_bytes(rows, read.columns)


def way_through(
    language_model: LanguageModel,
    shape: Sequence[int],
    method: Method,
    planned: Collection[str],
    *,
    passes: str,
    limit: int | None,
    dtype: torch.dtype | None,
    device: torch.device,
    devices: int,
    batch_size: int,
) -> dict[str, Any]:
    """What `arrange` says for a real model, as JSON can hold it: {"passes": "one" or "two",
    "spill": whether hidden states go to a file, "batch_size": windows of a batch, at most
    `batch_size`}.

    Without a `limit` it is what is free on the device now. Where that is plenty, and where a block
    cannot be run without numbers, nothing is forecast.
    """
    stored = language_model.model.dtype
    forward = dtype or stored
    largest = max(sum(p.numel() for p in block.parameters()) for block in language_model.blocks)
    free = available_bytes(device) if limit is None else limit
    if PLENTY * (hidden_bytes(shape, width(language_model), forward) + largest * 4) < free:
        return {
            "passes": "one" if passes == "auto" else passes,
            "spill": False,
            "batch_size": batch_size,
        }
    samples, length = shape
    if method.cost is None:
        way = without_forecast(passes, limit, batch_size)
        return {"passes": way.passes, "spill": way.spill, "batch_size": way.batch}
    try:
        at = loads(
            build(language_model.model.config, forward),
            samples,
            length,
            method,
            forward=forward,
            stored=stored,
            devices=devices,
            host=device.type == "cpu",
            spilled=language_model.spilled,
        )
        way = arrange(at, min(batch_size, samples), method, method.cost, planned, passes, free)
    except UnsupportedModel:
        way = without_forecast("two" if passes == "auto" else passes, limit, batch_size)
    return {"passes": way.passes, "spill": way.spill, "batch_size": way.batch}
