"""One pass over the blocks: the hidden states, the recorded calls, and the block at hand on every device.

The work is split over `devices` by batches: every device has a replica of the current block and its share of
the batches. Statistics are sums, so the shares merge exactly; they are added in the order of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.ahead import Ahead
from secateur.hidden import HiddenStates
from secateur.machine import release_memory, will_need
from secateur.model import Call, LanguageModel, Shell, run_block, working_copy
from secateur.ranks import ALONE, Ranks
from secateur.sites import recorded_inputs, signature, sites
from secateur.stats import OF_DENSE
from secateur.suspend import Stages, Suspended, find_stages
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


class Flow:
    """The state of one pass over the blocks: hidden states, recorded calls, replicas of the current block.

    With `dense`, a second stream goes through the dense blocks beside the first. With `spill`, a folder, hidden states
    lie in a file there. With several `ranks`, every one has its share of the batches, and statistics are those of all.
    """

    @torch.no_grad()
    def __init__(
        self,
        language_model: LanguageModel,
        batches: Sequence[Tensor],
        devices: Sequence[torch.device],
        dtype: torch.dtype | None,
        seconds: Seconds,
        *,
        shell: Shell | None = None,
        dense: bool = False,
        spill: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.language_model, self.devices, self.dtype = language_model, devices, dtype
        self.seconds, self.ahead = seconds, Ahead(devices, dtype)
        self.hidden = HiddenStates(spill)
        self.calls: list[list[Call]] = []
        self.replicas: list[nn.Module] = []
        self.done = False  # whether the hidden states are those behind the block at hand already
        self.dense: HiddenStates | None = None  # the hidden states in the dense model, where they are wanted
        self.dense_calls: list[list[Call]] = []
        self.targets: HiddenStates | None = None  # and what the dense block at hand makes of them
        self.originals: list[nn.Module] = []
        self._stages: dict[tuple[Any, ...], Stages] = {}
        self._threads = [ThreadPoolExecutor(1) for _ in devices] if len(devices) > 1 else []
        shell = shell or Shell(language_model, devices[0], dtype, head=False)
        started = perf_counter()
        for number, batch in enumerate(ranks.mine(batches)):
            hidden, calls = shell.enter(batch)
            self.hidden.append(hidden if spill else hidden.to(devices[number % len(devices)]))
            self.calls.append(calls if not number or not _same(calls, self.calls[0]) else self.calls[0])
        self.seconds.forward += perf_counter() - started
        if dense:
            self.dense = HiddenStates(spill, self.hidden)
            self.dense_calls = [own(calls, {}) for calls in self.calls]

    def open(self, index: int, block: nn.Module | None = None) -> None:
        """Take a block of the model in hand, or `block` in its place."""
        blocks = self.language_model.blocks
        original = blocks[index]
        for device in self.devices:
            if device.type == "cuda":  # what is let go may be written to from another stream
                torch.cuda.synchronize(device)
        self.replicas.clear()
        self.originals.clear()
        release_memory()
        moved = self.ahead.take(index) if block is None else None
        self.replicas = moved or [working_copy(block or original, device, self.dtype) for device in self.devices]
        if self.dense is not None:
            self.originals = [working_copy(original, device, self.dtype) for device in self.devices]
        self.targets, self.done = None, False
        if index + 1 < len(blocks):
            will_need(blocks[index + 1].parameters())
            if block is None:
                self.ahead.begin(index + 1, blocks[index + 1])

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead of the replicas; it may have other shapes."""
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
        """Run the block over all batches, where that is not done yet; its outputs replace its inputs."""
        started = perf_counter()
        if self.dense is not None:
            self.dense = self.dense_outputs(index)
        if not self.done:
            self.align()

            def forward(share: int) -> None:
                for number in self.of(share):
                    self.hidden[number] = self.forward(index, share, number)

            self.each(forward)
        self.seconds.forward += perf_counter() - started

    def align(self) -> None:
        """Give the other devices the block as it is now on the first, where its sites are written."""
        state = self.replicas[0].state_dict()
        for replica in self.replicas[1:]:
            replica.load_state_dict(state)

    def of(self, share: int) -> range:
        """The numbers of the batches that a device has."""
        return range(share, len(self.hidden), len(self.devices))

    def forward(self, index: int, share: int, number: int) -> Tensor:
        return run_block(self.replicas[share], self.hidden[number].to(self.devices[share]), self.calls[number][index])

    def dense_forward(self, index: int, share: int, number: int) -> Tensor:
        assert self.dense is not None
        hidden = self.dense[number].to(self.devices[share])
        return run_block(self.originals[share], hidden, self.dense_calls[number][index])

    def dense_outputs(self, index: int) -> HiddenStates:
        """What the dense block gives on the dense inputs, batch by batch; computed once."""
        if self.targets is None:
            assert self.dense is not None
            targets = HiddenStates(self.hidden.folder, self.dense)

            def forward(share: int) -> None:
                for number in self.of(share):
                    targets[number] = self.dense_forward(index, share, number)

            self.each(forward)
            self.targets = targets
        return self.targets

    def batches(self, index: int) -> list[Batch]:
        """The inputs of the block at hand, and what the dense block gives on the dense inputs."""
        started = perf_counter()
        targets = self.dense_outputs(index)
        self.seconds.forward += perf_counter() - started
        calls = (calls[index] for calls in self.calls)
        return [Batch(*parts) for parts in zip(self.hidden, calls, targets, strict=True)]

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(share)` for every device at once, each in a thread of its own; the results in device order."""
        if not self._threads:
            return [work(0)]
        work = torch.no_grad()(work)
        running = [thread.submit(work, share) for share, thread in enumerate(self._threads)]
        return [found.result() for found in running]

    @torch.no_grad()
    def observe(self, index: int, need: Iterable[str], probe: int, only: Collection[str] | None) -> Observed:
        """One forward of the block as it is now, in which the inputs of its sites are seen, or those in `only`."""
        need = tuple(need)
        watches = [Watch(need, only) for _ in self.devices]

        def forward(share: int) -> None:
            watch = watches[share]
            with recorded_inputs(self.replicas[share], watch.see):
                for number in self.of(share):
                    dense = self._dense_inputs(index, share, number, need, only)
                    watch.next_batch(self._probed(probe, number), dense)
                    self.forward(index, share, number)

        started = perf_counter()
        self.align()
        # Without statistics to gather, the first batch is enough for the probe.
        if need:
            self.each(forward)
        elif self.hidden:
            with recorded_inputs(self.replicas[0], watches[0].see):
                watches[0].next_batch(probe, {})
                self.forward(index, 0, 0)
        shared: dict[str, str] = {}
        for found in self.ranks.together(lambda: [watch.shared for watch in watches]):
            for part in found:
                shared |= part
        return self._merged(index, watches, shared, perf_counter() - started)

    @torch.no_grad()
    def stages(self, index: int) -> Stages:
        """The sites of the block at hand in the order in which forwards reach them; found once for each kind."""
        kind = signature(self.language_model.blocks[index])
        if kind not in self._stages:
            self._stages[kind] = self.ranks.same(
                lambda: find_stages(self.replicas[0], self.hidden[0].to(self.devices[0]), self.calls[0][index])
            )
        return self._stages[kind]

    def suspended(
        self, index: int, stages: Sequence[list[str]], need: Iterable[str], probe: int, *, finish: bool
    ) -> Iterator[tuple[list[str], Observed]]:
        """Each stage with what was seen of the inputs of its sites; by the next, they are pruned.

        With `finish`, the forwards go on to their end, and the hidden states are those behind the block.
        """
        need = tuple(need)
        paired = self.dense is not None and bool(OF_DENSE.intersection(need))

        def start(share: int) -> tuple[Suspended, Suspended | None]:
            ours = {number: partial(self.forward, index, share, number) for number in self.of(share)}
            theirs = {number: partial(self.dense_forward, index, share, number) for number in self.of(share)}
            return (
                Suspended(self.replicas[share], stages, ours),
                Suspended(self.originals[share], stages, theirs) if paired else None,
            )

        forwards = self.each(start)
        try:
            for number, stage in enumerate(stages):
                yield stage, self._collected(index, forwards, number, need, probe)
                self.align()
            self._finish(index, forwards, finish=finish)
        finally:
            self.each(lambda share: [held.close() for held in forwards[share] if held])

    @torch.no_grad()
    def _collected(
        self,
        index: int,
        forwards: Sequence[tuple[Suspended, Suspended | None]],
        stage: int,
        need: tuple[str, ...],
        probe: int,
    ) -> Observed:
        names = forwards[0][0].stages[stage]
        fused = sites(self.replicas[0])[names[0]].expert
        shared = {name: name if fused else names[0] for name in names}

        def collect(share: int) -> Watch:
            watch = Watch(need, None)
            ours, theirs = forwards[share]
            # Which tokens reach an expert differs between the two models, so there are no pairs to sum over.
            twins = theirs.inputs(stage) if theirs and not fused else None
            for number, reached in ours.inputs(stage):
                dense = dict(next(twins)[1]) if twins else {}
                watch.next_batch(self._probed(probe, number), dense)
                for name, x in reached:
                    watch.see(name, x)
            return watch

        started = perf_counter()
        return self._merged(index, self.each(collect), shared, perf_counter() - started)

    @torch.no_grad()
    def _finish(self, index: int, forwards: Sequence[tuple[Suspended, Suspended | None]], *, finish: bool) -> None:
        def end(share: int) -> None:
            ours, theirs = forwards[share]
            if theirs and targets:
                for number, output in theirs.outputs():
                    targets[number] = output
            for number, output in ours.outputs() if finish else ():
                self.hidden[number] = output

        started = perf_counter()
        targets = HiddenStates(self.hidden.folder, self.dense) if self.dense and forwards[0][1] else None
        self.each(end)
        self.done = finish
        self.targets = targets or self.targets
        self.seconds.forward += perf_counter() - started

    def _probed(self, probe: int, number: int) -> int:
        """How many tokens of a batch are kept to measure errors on: only of the very first."""
        return probe if number == 0 and self.ranks.first else 0

    def _merged(self, index: int, watches: Sequence[Watch], shared: dict[str, str], seconds: float) -> Observed:
        """What all devices saw together, in `seconds`. Raises NonFinite."""
        statistics = sum(watch.seconds for watch in watches)
        self.seconds.forward += seconds - statistics
        self.seconds.statistics += statistics
        total, probes = dict(watches[0].stats), watches[0].probes
        for watch in watches[1:]:
            for name, stats in watch.stats.items():
                total[name] = total[name] + stats if name in total else stats
        total = self.ranks.add(total)
        self.ranks.together(lambda: refuse_non_finite(self.language_model.block_name(index), total, probes))
        return Observed(
            {name: total[first] for name, first in shared.items() if first in total},
            {name: probes[first] for name, first in shared.items() if first in probes},
            shared,
        )

    def _dense_inputs(
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
            self.dense_forward(index, share, number)
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
