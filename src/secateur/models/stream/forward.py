"""One stream of hidden states through the blocks, and the block at hand on every device.

The work is split over the devices by batches: every device has a replica of the current block and
its share of the batches. Statistics are sums, so the shares merge exactly; they are added in the
order of the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import Seconds
from secateur.models.hooks import recorded_inputs
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.replay import Call, LanguageModel, Shell, own, run_block, same, working_copy
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.models.stream.prefetch import Prefetch
from secateur.models.stream.steps import batch_of_a_step
from secateur.system.memory import release_memory, will_need
from secateur.system.progress import Progress

Value = TypeVar("Value")
Outputs = Callable[[int], Iterator[tuple[int, Tensor]]]
"""What leaves a block, (batch, hidden states), of one device."""


@dataclass(frozen=True)
class BlockRun:
    """A model and the text that goes through its blocks one by one, and on what that is computed.

    `tokens` `[samples, length]` go through in batches of `batch_size` windows, shared by `devices`
    and `ranks`, in `dtype` (None: as stored). `spill` is a folder for hidden states that should not
    lie in memory. `seconds` counts where the time goes. `counted` `[samples, length]` bool: the
    tokens that statistics are taken on, None for all. `bos`: whether every window begins with BOS.
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
    counted: Tensor | None = None
    bos: bool = False

    def by_steps(self) -> BlockRun:
        """The same run with batches that each make a step of tuning, where they are larger."""
        windows, length = self.tokens.shape
        return replace(self, batch_size=batch_of_a_step(windows, length, self.batch_size))

    def first_batch(self) -> BlockRun:
        """The same run on its first batch alone."""
        counted = None if self.counted is None else self.counted[: self.batch_size]
        return replace(self, tokens=self.tokens[: self.batch_size], counted=counted)


class Batch(NamedTuple):
    """Some calibration windows at one block: `hidden` enters it, `target` should leave it.

    `counted` `[windows, length]` bool: the tokens that count, None for all.
    """

    hidden: Tensor
    call: Call
    target: Tensor
    counted: Tensor | None = None


class ForwardPass:
    """The hidden states that enter the block at hand, by batch, and what runs them through it.

    `calls` holds how the model calls each block, by batch, `counted` which of its tokens count;
    `replicas` the block at hand on each device, in the dtype of the run. With several ranks, every
    one has its share of the batches.
    """

    @torch.no_grad()
    def __init__(self, run: BlockRun, shell: Shell | None = None) -> None:
        self.run, self.index = run, -1
        self.hidden = HiddenStateStore(run.spill)
        self.calls: list[list[Call]] = []
        masks = None if run.counted is None else run.counted.split(run.batch_size)
        self.counted: list[Tensor] | None = None if masks is None else list(run.ranks.mine(masks))
        self.replicas: list[nn.Module] = []
        count = len(run.devices)
        self._prefetch = Prefetch(run.devices, run.dtype)
        self._threads = [ThreadPoolExecutor(1) for _ in run.devices] if count > 1 else []
        shell = shell or Shell(run.language_model, run.devices[0], run.dtype, head=False)
        with run.seconds.counted("forward"):
            for number, batch in enumerate(run.ranks.mine(run.tokens.split(run.batch_size))):
                hidden, calls = shell.enter(batch)
                self.hidden.append(hidden if run.spill else hidden.to(run.devices[number % count]))
                alike = number and same(calls, self.calls[0])
                self.calls.append(self.calls[0] if alike else calls)

    def beside(self) -> ForwardPass:
        """A second stream from the same hidden states, in the same threads, with its own calls."""
        other = copy(self)
        other.hidden, other.replicas = HiddenStateStore(self.run.spill, self.hidden), []
        other.calls = [own(calls, {}) for calls in self.calls]
        return other

    def open(self, index: int, block: nn.Module | None = None) -> None:
        """Take a block of the model in hand, or `block` in its place."""
        blocks = self.run.language_model.blocks
        self.close()
        self.index = index
        if block is None and (moved := self._prefetch.take(index)):
            self.replicas = moved
        else:
            self.replace(block or blocks[index])
        if index + 1 < len(blocks):
            will_need(blocks[index + 1].parameters())
            if block is None:
                self._prefetch.begin(index + 1, blocks[index + 1])

    def close(self) -> None:
        """Let go of the block at hand."""
        for device in self.run.devices:
            if device.type == "cuda":  # what is let go may be written to from another stream
                torch.cuda.synchronize(device)
        self.replicas = []
        release_memory()

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead; it may have other shapes."""
        self.replicas = [working_copy(block, d, self.run.dtype) for d in self.run.devices]

    def align(self) -> None:
        """Give the other devices the block as it is now on the first, where weights are written."""
        for replica in self.replicas[1:]:
            replica.load_state_dict(self.replicas[0].state_dict())

    def batches_of(self, share: int) -> range:
        """The numbers of the batches that a device has."""
        return range(share, len(self.hidden), len(self.run.devices))

    def counted_in(self, number: int) -> Tensor | None:
        """The tokens of a batch that count, `[windows, length]` bool; None for all."""
        return None if self.counted is None else self.counted[number]

    def masks(self) -> list[Tensor | None]:
        """The tokens that count, batch by batch."""
        return [self.counted_in(number) for number in range(len(self.hidden))]

    def forward(self, share: int, number: int) -> Tensor:
        """What the block at hand makes of one batch, on the device that has it."""
        hidden = self.hidden[number].to(self.run.devices[share])
        return run_block(self.replicas[share], hidden, self.calls[number][self.index])

    def outputs(self, share: int) -> Iterator[tuple[int, Tensor]]:
        """(batch, what the block makes of it) for all batches of a device."""
        return ((number, self.forward(share, number)) for number in self.batches_of(share))

    def first(self) -> tuple[Tensor, Call]:
        """The hidden states of the first batch as they enter the block, and its call."""
        return self.hidden[0].to(self.run.devices[0]), self.calls[0][self.index]

    def windows(self) -> list[tuple[Tensor, list[Call]]]:
        """By batch, the hidden states that enter the block, and the calls of all blocks."""
        batches = zip(self.hidden, self.calls, strict=True)
        return [(hidden.to(self.run.devices[0]), calls) for hidden, calls in batches]

    def aside(self, outputs: Outputs) -> HiddenStateStore:
        """What leaves the block, beside what entered it."""
        return self.advance(outputs, HiddenStateStore(self.run.spill, self.hidden))

    @torch.no_grad()
    def advance(self, outputs: Outputs, into: HiddenStateStore | None = None) -> HiddenStateStore:
        """Put what leaves the block in the place of what entered it (or `into`), on all devices."""
        store = self.hidden if into is None else into

        def fill(share: int) -> None:
            for number, output in outputs(share):
                store[number] = output

        self.each(fill)
        return store

    def each(self, work: Callable[[int], Value]) -> list[Value]:
        """`work(share)` for every device at once, each in its thread; results in device order."""
        if not self._threads:
            return [work(0)]
        work = torch.no_grad()(work)
        running = [thread.submit(work, share) for share, thread in enumerate(self._threads)]
        return [result.result() for result in running]


@torch.no_grad()
def final_hidden(
    language_model: LanguageModel,
    shell: Shell,
    tokens: Tensor,
    dtype: torch.dtype | None,
    batch_size: int,
) -> Tensor:
    """What the last block returns for tokens, `[…, samples, length, hidden]` on the CPU.

    Most families have nothing before the samples; Gemma 3n has several streams there.
    """
    run = BlockRun(language_model, tokens, [shell.device], dtype, batch_size)
    return torch.cat(final_batches(run, shell), dim=-3)


def final_batches(run: BlockRun, shell: Shell) -> list[Tensor]:
    """What the last block returns for the tokens of a run, as `final_hidden` by batch; in a file
    where the run has a folder for it.
    """
    flow = ForwardPass(run, shell)
    for index in range(len(run.language_model.blocks)):
        flow.open(index)
        flow.advance(flow.outputs)
    return [hidden.cpu() for hidden in flow.hidden]


def linear_inputs(
    flow: ForwardPass, share: int, number: int, only: Collection[str] | None
) -> dict[str, Tensor]:
    """The inputs of the block's linear layers for one batch, those in `only`; not of experts.

    Which tokens reach an expert differs between two models, so there are no pairs to sum over.
    """
    inputs: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        if not _of_expert(name) and (only is None or name in only):
            inputs[name] = x

    if only is None or not all(map(_of_expert, only)):
        with recorded_inputs(flow.replicas[share], record):
            flow.forward(share, number)
    return inputs


def _of_expert(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
