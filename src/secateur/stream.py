"""The blocks in order, each with its calibration inputs: data only moves forward.

`stream` records what enters block 0, then yields one `Step` per block. While a step is open its user reads
statistics of the block's inputs and writes new weights into the working copy; asking for the next step runs
the changed block, so the inputs of block i+1 come from the pruned block i, and overwrites the hidden states.

The work is split over `devices` by batches: every device has a replica of the current block and its share of
the batches. Statistics are sums, so the shares merge exactly; they are added in the order of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.machine import release_memory
from secateur.model import (
    Call,
    LanguageModel,
    Shell,
    run_block,
    working_copy,
)
from secateur.sites import Site, recorded_inputs, sites
from secateur.stats import OF_DENSE
from secateur.watch import Observed, Watch, refuse_non_finite


@dataclass
class Seconds:
    """Where the time of a run goes, in seconds; concurrent devices add up."""

    forward: float = 0.0
    statistics: float = 0.0
    solve: float = 0.0
    refine: float = 0.0
    plan: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


class Batch(NamedTuple):
    """Some calibration windows at one block: `hidden` enters it, `target` is what should leave it."""

    hidden: Tensor
    call: Call
    target: Tensor


@dataclass
class Step:
    """One block with its calibration inputs. `block` is a working copy; `sites` are views of its weights."""

    index: int
    name: str
    block: nn.Module
    sites: dict[str, Site]
    seconds: Seconds
    _observe: Callable[..., Observed] = field(repr=False)
    _batches: Callable[[], list[Batch]] = field(repr=False)
    _windows: Callable[[], list[tuple[Tensor, list[Call]]]] = field(repr=False)
    _replace: Callable[[nn.Module], None] = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the working copy lies."""
        return next(self.block.parameters()).device

    @torch.no_grad()
    def observe(self, need: Iterable[str], probe: int, only: Collection[str] | None = None) -> Observed:
        """One forward of the block as it is now, in which the inputs of its sites are seen, or those in `only`.

        The probe takes evenly spaced tokens of the first batch, about `probe` of them. Raises NonFinite.
        """
        return self._observe(need, probe, only)

    def first(self) -> tuple[Tensor, Call]:
        """The hidden states of the first batch as they enter the block, and its call."""
        hidden, calls = self._windows()[0]
        return hidden, calls[self.index]

    def windows(self) -> list[tuple[Tensor, list[Call]]]:
        """The hidden states of every batch as they enter the block, and the calls of all blocks of the model."""
        return [(hidden.to(self.device), calls) for hidden, calls in self._windows()]

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead of the working copy, which is dropped; it may have other shapes."""
        self._replace(block)

    @torch.no_grad()
    def batches(self) -> list[Batch]:
        """The inputs of the block, and what the dense block gives on the dense inputs; `stream` with `dense` only."""
        return self._batches()

    def groups(self) -> list[list[str]]:
        """The sites in the order in which the block reaches them, those that share an input together.

        All experts' matrices of one kind are one group. Sites that the first batch does not reach come last.
        """
        order = self.observe((), 1).shared
        groups: dict[str, list[str]] = {}
        for name, first in order.items():
            site = self.sites[name]
            groups.setdefault(site.parameter if site.expert else first, []).append(name)
        rest = [name for name in self.sites if name not in order]
        return [*groups.values(), *([rest] if rest else [])]


def stream(
    language_model: LanguageModel,
    tokens: Tensor,
    *,
    devices: Sequence[torch.device],
    dtype: torch.dtype | None,
    batch_size: int,
    seconds: Seconds | None = None,
    dense: bool = False,
    kept: Collection[int] | None = None,
) -> Iterator[Step]:
    """The blocks in order with the inputs that `tokens` `[samples, length]` give them; those in `kept`, or all.

    With `dense`, a second stream goes through the dense blocks, for the statistic "cross" and for `Step.batches`.
    """
    # Not under no_grad as a whole: torch's wrapper of a generator would hold on to the step before.
    run = _Run(language_model, list(tokens.split(batch_size)), devices, dtype, seconds or Seconds())
    if dense:
        run.dense = list(run.hidden)
        run.dense_calls = [own(calls, {}) for calls in run.calls]
    count = len(language_model.blocks)
    last = count - 1 if kept is None else max(kept)
    for index in range(last + 1):
        if kept is not None and index not in kept:
            run.skip(index)
            continue
        step = run.open(index)
        yield step
        del step  # its copy of the block would live beside the next one
        if index < last:
            run.advance(index)


@torch.no_grad()
def final_hidden(
    language_model: LanguageModel, shell: Shell, tokens: Tensor, dtype: torch.dtype | None, batch_size: int
) -> Tensor:
    """What the last block returns for tokens `[samples, length]`: `[…, samples, length, hidden]`, on the CPU.

    Most families have nothing before the samples; Gemma 3n has several streams there.
    """
    run = _Run(language_model, list(tokens.split(batch_size)), [shell.device], dtype, Seconds(), shell)
    for index in range(len(language_model.blocks)):
        run.open(index)
        run.advance(index)
    return torch.cat([hidden.cpu() for hidden in run.hidden], dim=-3)


class _Run:
    """The state of one pass over the blocks: hidden states, recorded calls, replicas of the current block."""

    @torch.no_grad()
    def __init__(
        self,
        language_model: LanguageModel,
        batches: list[Tensor],
        devices: Sequence[torch.device],
        dtype: torch.dtype | None,
        seconds: Seconds,
        shell: Shell | None = None,
    ) -> None:
        self.language_model, self.devices, self.dtype = language_model, devices, dtype
        self.seconds = seconds
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = []
        self.replicas: list[nn.Module] = []
        self.dense: list[Tensor] | None = None  # the hidden states in the dense model, where they are wanted
        self.dense_calls: list[list[Call]] = []
        self.targets: list[Tensor] | None = None  # and what the dense block at hand makes of them
        self.originals: list[nn.Module] = []
        shell = shell or Shell(language_model, devices[0], dtype, head=False)
        started = perf_counter()
        for number, batch in enumerate(batches):
            hidden, calls = shell.enter(batch)
            device = devices[number % len(devices)]
            self.hidden.append(hidden.to(device))
            self.calls.append(calls if not number or not _same(calls, self.calls[0]) else self.calls[0])
        self.seconds.forward += perf_counter() - started

    def open(self, index: int) -> Step:
        original = self.language_model.blocks[index]
        self.replicas.clear()
        self.originals.clear()
        release_memory()
        self.replicas = [working_copy(original, device, self.dtype) for device in self.devices]
        if self.dense is not None:
            self.originals = [working_copy(original, device, self.dtype) for device in self.devices]
        block = self.replicas[0]
        name = self.language_model.block_name(index)
        self.targets = None
        return Step(
            index, name, block, sites(block), self.seconds, lambda *a: self.observe(index, *a),
            lambda: self.batches(index), lambda: list(zip(self.hidden, self.calls, strict=True)), self.replace,
        )  # fmt: skip

    def replace(self, block: nn.Module) -> None:
        self.replicas = [working_copy(block, device, self.dtype) for device in self.devices]

    @torch.no_grad()
    def skip(self, index: int) -> None:
        """Leave a block out; only the dense stream goes through it."""
        if self.dense is not None:
            self.originals = [
                working_copy(self.language_model.blocks[index], device, self.dtype) for device in self.devices
            ]
            self.targets = None
            self.dense = self.dense_outputs(index)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the block over all batches; its outputs replace its inputs."""
        self.align()

        def forward(share: int) -> None:
            for number in range(share, len(self.hidden), len(self.devices)):
                self.hidden[number] = self.forward(index, share, number)

        started = perf_counter()
        if self.dense is not None:
            self.dense = self.dense_outputs(index)
        self.each(forward)
        self.seconds.forward += perf_counter() - started

    def align(self) -> None:
        """Give the other devices the block as it is now on the first, where its sites are written."""
        state = self.replicas[0].state_dict()
        for replica in self.replicas[1:]:
            replica.load_state_dict(state)

    def dense_outputs(self, index: int) -> list[Tensor]:
        """What the dense block gives on the dense inputs, batch by batch; computed once."""
        if self.targets is None:
            dense, targets = self.dense or [], [torch.empty(0)] * len(self.hidden)

            def forward(share: int) -> None:
                for number in range(share, len(dense), len(self.devices)):
                    targets[number] = run_block(self.originals[share], dense[number], self.dense_calls[number][index])

            self.each(forward)
            self.targets = targets
        return self.targets

    def batches(self, index: int) -> list[Batch]:
        started = perf_counter()
        targets = self.dense_outputs(index)
        self.seconds.forward += perf_counter() - started
        calls = (calls[index] for calls in self.calls)
        return [Batch(*parts) for parts in zip(self.hidden, calls, targets, strict=True)]

    def forward(self, index: int, share: int, number: int) -> Tensor:
        return run_block(self.replicas[share], self.hidden[number], self.calls[number][index])

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(share)` for every device at once; the results in device order."""
        if len(self.devices) == 1:
            return [work(0)]
        with ThreadPoolExecutor(len(self.devices)) as pool:
            return list(pool.map(torch.no_grad()(work), range(len(self.devices))))

    def observe(self, index: int, need: Iterable[str], probe: int, only: Collection[str] | None) -> Observed:
        need = tuple(need)
        watches = [Watch(need, only) for _ in self.devices]

        def forward(share: int) -> None:
            watch = watches[share]
            with recorded_inputs(self.replicas[share], watch.see):
                for number in range(share, len(self.hidden), len(self.devices)):
                    watch.next_batch(probe if number == 0 else 0, self.dense_inputs(index, share, number, need, only))
                    self.forward(index, share, number)

        started = perf_counter()
        self.align()
        # Without statistics to gather, the first batch is enough for the probe.
        if need:
            self.each(forward)
        else:
            with recorded_inputs(self.replicas[0], watches[0].see):
                watches[0].next_batch(probe, {})
                self.forward(index, 0, 0)
        statistics = sum(watch.seconds for watch in watches)
        self.seconds.forward += perf_counter() - started - statistics
        self.seconds.statistics += statistics
        total, shared = dict(watches[0].stats), dict(watches[0].shared)
        for watch in watches[1:]:
            shared |= watch.shared
            for name, stats in watch.stats.items():
                total[name] = total[name] + stats if name in total else stats
        refuse_non_finite(self.language_model.block_name(index), total, watches[0].probes)
        release_memory()
        probes = watches[0].probes
        return Observed(
            {name: total[first] for name, first in shared.items() if first in total},
            {name: probes[first] for name, first in shared.items() if first in probes},
            shared,
        )

    def dense_inputs(
        self, index: int, share: int, number: int, need: tuple[str, ...], only: Collection[str] | None
    ) -> dict[str, Tensor]:
        """The inputs of the block's linear layers in the dense model, for one batch, those in `only`; not of experts.

        Which tokens reach an expert differs between the two models, so there are no pairs to sum over.
        """
        found: dict[str, Tensor] = {}
        if self.dense is None or not OF_DENSE.intersection(need):
            return found
        block = self.originals[share]
        linear = {name for name in sites(block) if not any(part.isdigit() for part in name.split("."))}
        if not (linear := linear if only is None else linear & set(only)):
            return found
        with recorded_inputs(block, lambda name, x: found.update({name: x} if name in linear else {})):
            run_block(block, self.dense[number], self.dense_calls[number][index])
        return found


def own(value: Any, memo: dict[int, Any]) -> Any:
    """Recorded calls once more, with one `memo` for a batch: tensors are shared, what blocks leave for later is not."""
    if isinstance(value, Call):
        return Call(*(own(part, memo) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(own(part, memo) for part in value)
    if type(value) is dict:
        return {key: own(part, memo) for key, part in value.items()}
    return value if isinstance(value, Tensor) else memo.setdefault(id(value), deepcopy(value))


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or (isinstance(a, (str, int, float, bool)) and a == b)
