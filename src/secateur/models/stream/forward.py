"""One pass over the blocks: the hidden states, the recorded calls, and the block at hand on every
device.

The work is split over `devices` by batches: every device has a replica of the current block and its
share of the batches. Statistics are sums, so the shares merge exactly; they are added in the order
of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import Seconds
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import signature
from secateur.models.replay import Call, LanguageModel, Shell, own, run_block, same, working_copy
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.models.stream.paused import InputGroups, find_groups
from secateur.models.stream.prefetch import Prefetch
from secateur.system.memory import release_memory, will_need
from secateur.system.progress import Progress


@dataclass(frozen=True)
class BlockRun:
    """A model and the text that goes through its blocks one by one, and on what that is computed.

    `tokens` `[samples, length]` go through in batches of `batch_size` windows, shared by `devices`
    and `ranks`, in `dtype` (None: as stored). `spill` is a folder for hidden states that should not
    lie in memory. `seconds` counts where the time goes.
    """

    language_model: LanguageModel
    tokens: Tensor
    devices: Sequence[torch.device]
    dtype: torch.dtype | None
    batch_size: int
    spill: Path | None = None
    ranks: Ranks = ALONE
    seconds: Seconds = field(default_factory=Seconds)
    progress: Progress = field(default_factory=Progress)


class Batch(NamedTuple):
    """Some calibration windows at one block: `hidden` enters it, `target` is what should leave
    it.
    """

    hidden: Tensor
    call: Call
    target: Tensor


class ForwardPass:
    """The state of one pass over the blocks: hidden states, recorded calls, replicas of the current
    block.

    With `dense`, a second stream goes through the dense blocks beside the first. With several
    ranks, every one has its share of the batches, and statistics are those of all.
    """

    @torch.no_grad()
    def __init__(self, run: BlockRun, *, shell: Shell | None = None, dense: bool = False) -> None:
        devices, spill = run.devices, run.spill
        self.ranks = run.ranks
        self.language_model, self.devices, self.dtype = run.language_model, devices, run.dtype
        self.seconds, self.prefetch = run.seconds, Prefetch(devices, run.dtype)
        self.hidden = HiddenStateStore(spill)
        self.calls: list[list[Call]] = []
        self.replicas: list[nn.Module] = []
        self.done = False  # whether the hidden states are those behind the block at hand already
        self.dense: HiddenStateStore | None = (
            None  # the hidden states in the dense model, where they are wanted
        )
        self.dense_calls: list[list[Call]] = []
        self.targets: HiddenStateStore | None = (
            None  # and what the dense block at hand makes of them
        )
        self.originals: list[nn.Module] = []
        self._stages: dict[tuple[Any, ...], InputGroups] = {}
        self._threads = [ThreadPoolExecutor(1) for _ in devices] if len(devices) > 1 else []
        shell = shell or Shell(run.language_model, devices[0], run.dtype, head=False)
        started = perf_counter()
        for number, batch in enumerate(run.ranks.mine(run.tokens.split(run.batch_size))):
            hidden, calls = shell.enter(batch)
            self.hidden.append(hidden if spill else hidden.to(devices[number % len(devices)]))
            self.calls.append(
                calls if not number or not same(calls, self.calls[0]) else self.calls[0]
            )
        self.seconds.forward += perf_counter() - started
        if dense:
            self.dense = HiddenStateStore(spill, self.hidden)
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
        moved = self.prefetch.take(index) if block is None else None
        self.replicas = moved or [
            working_copy(block or original, device, self.dtype) for device in self.devices
        ]
        if self.dense is not None:
            self.originals = [working_copy(original, device, self.dtype) for device in self.devices]
        self.targets, self.done = None, False
        if index + 1 < len(blocks):
            will_need(blocks[index + 1].parameters())
            if block is None:
                self.prefetch.begin(index + 1, blocks[index + 1])

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead of the replicas; it may have other shapes."""
        self.replicas = [working_copy(block, device, self.dtype) for device in self.devices]

    @torch.no_grad()
    def skip(self, index: int) -> None:
        """Leave a block out; only the dense stream goes through it."""
        if self.dense is not None:
            self.originals = [
                working_copy(self.language_model.blocks[index], device, self.dtype)
                for device in self.devices
            ]
            self.targets = None
            self.dense = self.dense_outputs(index)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run the block over all batches, where that is not done yet; its outputs replace its
        inputs.
        """
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
        """Give the other devices the block as it is now on the first, where its sites are
        written.
        """
        state = self.replicas[0].state_dict()
        for replica in self.replicas[1:]:
            replica.load_state_dict(state)

    def of(self, share: int) -> range:
        """The numbers of the batches that a device has."""
        return range(share, len(self.hidden), len(self.devices))

    def forward(self, index: int, share: int, number: int) -> Tensor:
        return run_block(
            self.replicas[share],
            self.hidden[number].to(self.devices[share]),
            self.calls[number][index],
        )

    def dense_forward(self, index: int, share: int, number: int) -> Tensor:
        assert self.dense is not None
        hidden = self.dense[number].to(self.devices[share])
        return run_block(self.originals[share], hidden, self.dense_calls[number][index])

    def dense_outputs(self, index: int) -> HiddenStateStore:
        """What the dense block gives on the dense inputs, batch by batch; computed once."""
        if self.targets is None:
            assert self.dense is not None
            targets = HiddenStateStore(self.hidden.folder, self.dense)

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
        """`work(share)` for every device at once, each in a thread of its own; the results in
        device order.
        """
        if not self._threads:
            return [work(0)]
        work = torch.no_grad()(work)
        running = [thread.submit(work, share) for share, thread in enumerate(self._threads)]
        return [found.result() for found in running]

    @torch.no_grad()
    def stages(self, index: int) -> InputGroups:
        """The sites of the block at hand in the order in which forwards reach them; found once for
        each kind.
        """
        kind = signature(self.language_model.blocks[index])
        if kind not in self._stages:
            self._stages[kind] = self.ranks.same(
                lambda: find_groups(
                    self.replicas[0], self.hidden[0].to(self.devices[0]), self.calls[0][index]
                )
            )
        return self._stages[kind]
