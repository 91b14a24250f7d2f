"""How often tokens go through a block, and the operations that a run takes.

Both follow from what a method says of itself (`Method.need`, `sequential`, `refine`, `cost`) and
from what the blocks do to a batch (`outline`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Literal, NamedTuple

import torch

from secateur.kernels.gram import add_products
from secateur.methods import Method
from secateur.methods.cost import Cost
from secateur.methods.statistics import OF_DENSE
from secateur.models.context import vocabulary_size, width
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import PROBE_TOKENS
from secateur.models.stream.distil import steps_of
from secateur.models.stream.refine import steps_on
from secateur.models.stream.steps import held_back, judging_batches, section_length, step_windows
from secateur.pruning.planning.outline import Kind, Outline, Read, outline, restacked
from secateur.system.machine import best_seconds, matrix_rate, square_side

Mode = Literal["one", "two"]
MODES: tuple[Mode, ...] = ("one", "two")
GRAM = "Gram matrices"
"""Their rate: two operations for each product of two inputs, though half are not computed."""


class Passes(NamedTuple):
    """How often tokens go through a block; the backward half of a step of `+refine` counts as two.

    `whole`, all calibration windows; `first`, the first batch alone; `after`, all windows through
    the finished block, for the inputs of the next one: the last block has none.
    """

    whole: float
    first: int
    after: int


def passes(method: Method, groups: int, mode: Mode, windows: int, batch: int) -> Passes:
    """The passes of so many windows, by batches, through a block whose weight matrices read
    `groups` different inputs.

    `two`: one pass looks and the next goes on; a method that is `sequential` looks at every group.
    `one`: the block runs once, all batches waiting at each group until it is solved.
    """
    dense = needs_dense(method)
    batches = [min(batch, windows - start) for start in range(0, windows, batch)]
    held = judging_batches(batches)
    steps = steps_on(method.refine, len(batches) - held)
    tuning = (2 * (held or len(batches)) + 3 * steps) / len(batches) if method.refine else 0
    if mode == "one":
        return Passes(1 + dense + tuning, 0, 1 if method.refine else 0)
    turns = groups if method.sequential else 1
    crossed = not OF_DENSE.isdisjoint(method.need)
    return Passes(
        whole=(turns * (1 + crossed) if method.need else 0) + (tuning + 1 if method.refine else 0),
        first=0 if method.need else turns,
        after=1 + (dense and not method.refine),
    )


def needs_dense(method: Method) -> bool:
    """Whether the calibration tokens go through the dense model as well."""
    return not OF_DENSE.isdisjoint(method.need) or method.refine > 0


@dataclass(frozen=True)
class Workload:
    """A run, as far as its memory and its operations depend on it.

    `built` is the model on the meta device, `planned` names the weight matrices that are pruned,
    `samples` windows of `length` tokens go through it, `batch` at a time, shared by `devices`, in
    the dtype `forward`. `spilled`: weights that the loader stacks lie in a file.
    """

    built: LanguageModel
    method: Method
    planned: Collection[str]
    samples: int
    length: int
    forward: torch.dtype
    stored: torch.dtype
    devices: Sequence[torch.device]
    spilled: bool = False
    batch: int = 1
    _outlines: dict[int, Outline] = field(default_factory=dict, repr=False)

    @property
    def cost(self) -> Cost:
        """What the method says of its cost; where it says nothing, nothing is asked for."""
        assert self.method.cost is not None, "a method without `cost` is not forecast"
        return self.method.cost

    @property
    def on_host(self) -> bool:
        """Whether the blocks run on the processor."""
        return self.devices[0].type == "cpu"

    @cached_property
    def stacked_bytes(self) -> int:
        """Weights that the loader puts together, as they are stored."""
        return restacked(self.built) * self.stored.itemsize

    @property
    def outline(self) -> Outline:
        """What a batch makes of the model, computed once for each size of it."""
        if self.batch not in self._outlines:
            tuning = self.method.refine + self.method.distil > 0
            self._outlines[self.batch] = outline(self.built, self.batch, self.length, tuning=tuning)
        return self._outlines[self.batch]

    @property
    def windows(self) -> int:
        """How many windows go through the blocks: without need of any, those of the first batch."""
        return self.samples if self.method.need or self.method.refine else self.batch

    def rows(self, kind: Kind, read: Read) -> list[int]:
        """The outputs of each matrix that reads an input and is pruned."""
        return [rows for name, rows in read.rows.items() if f"{kind.name}.{name}" in self.planned]

    def probe_tokens(self, read: Read) -> int:
        """How many tokens of the first batch the output error is measured on."""
        tokens = self.batch * self.length * read.share
        return ceil(tokens / max(ceil(tokens / PROBE_TOKENS), 1))


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


def operations(work: Workload, mode: Mode) -> Operations:
    """The operations of all blocks."""
    kinds = work.outline.kinds
    return Operations(
        sum(_forward(work, mode, kind) for kind in kinds) + _distilling(work),
        sum(_statistics(work, kind) for kind in kinds),
        sum(_solve(work, kind) for kind in kinds),
    )


def _forward(work: Workload, mode: Mode, kind: Kind) -> float:
    """Forward passes through blocks of a kind; the model's last has fewer: nothing follows it."""
    windows, count = work.windows, kind.count
    often = passes(work.method, kind.groups, mode, windows, work.batch)
    inner = (often.whole * windows + often.first * min(windows, work.batch)) * count
    outer = often.after * windows * (count - kind.has_last)
    flops = (kind.flops * (inner + outer) + kind.watch_flops * inner) / work.batch
    if mode == "one" or work.method.sequential:
        flops += kind.flops  # one batch, to find the stages
    if mode == "one" and kind.has_last and not work.method.refine:  # it ends at its last matrices
        tokens, end = windows * work.length, kind.reads[-1].group
        last = [read for read in kind.reads if read.group == end and read.share == 1]
        flops -= sum(2 * tokens * read.columns * sum(read.rows.values()) for read in last)
    return flops


def _distilling(work: Workload) -> float:
    """All blocks tuned together: the dense model on the windows that are used, then each that is
    tuned on forward twice and backward, and each that judges forward twice; the output embedding at
    their ends.
    """
    if not work.method.distil or work.samples < 2:
        return 0.0
    judged, section = held_back(work.samples), section_length(work.length)
    sections = (work.samples - judged) * (work.length // section)
    steps = steps_of(work.method.distil, sections, work.length)
    seen, share = steps * min(step_windows(work.length), sections), section / work.length
    used, tuned = judged + min(seen, sections) * share, seen * share  # in windows
    flops = sum(kind.flops * kind.count for kind in work.outline.kinds) / work.batch
    head = 2 * work.length * width(work.built) * vocabulary_size(work.built.model)
    return flops * (used + 4 * tuned + 2 * judged) + head * (3 * tuned + 4 * judged)


def _statistics(work: Workload, kind: Kind) -> float:
    """Gram matrices of all inputs, and their products with those of the dense model."""
    flops, need = 0.0, work.method.need
    for read in kind.reads:
        matrices = ("gram" in need) + ("cross" in need and read.share == 1)
        tokens = work.windows * work.length * read.share
        flops += kind.count * matrices * 2 * tokens * read.columns**2
    return flops


def _solve(work: Workload, kind: Kind) -> float:
    """The method itself, and what a matrix gives before and after, for the error that is reported.

    Matrices that read the same input are solved as one where their rows are independent.
    """
    method, flops = work.method, 0.0
    for read in kind.reads:
        if rows := work.rows(kind, read):
            errors = 4 * work.probe_tokens(read) * read.columns * sum(rows)
            stacks = [sum(rows)] if method.row_wise and "gram" in method.need else rows
            solving = sum(work.cost.of_matrix(stack, read.columns) for stack in stacks)
            flops += kind.count * (work.cost.shared(read.columns) + solving + errors)
    return flops


def rates(device: torch.device, forward: torch.dtype) -> dict[str, float]:
    """Operations a second of products in the dtypes of a run and of Gram matrices, measured now."""
    dtypes = dict.fromkeys((forward, torch.float32))
    measured = {str(dtype).removeprefix("torch."): matrix_rate(dtype, device) for dtype in dtypes}
    side = square_side(device)
    x = torch.randn(side, side, dtype=forward, device=device)
    total = torch.zeros(side, side, dtype=torch.float64, device=device)
    seconds = best_seconds(lambda: add_products(total, x, x), device)
    return measured | {GRAM: 2 * side**3 / seconds}


def seconds_of(operations: Operations, rates: Mapping[str, float]) -> Operations:
    """Seconds in place of operations, at `rates`, of which the first is that of forward passes."""
    return Operations(
        operations.forward / next(iter(rates.values())),
        operations.statistics / rates[GRAM],
        operations.solve / rates["float32"],
    )
