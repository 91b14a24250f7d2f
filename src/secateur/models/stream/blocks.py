"""The blocks in order, each with its calibration inputs: data only moves forward.

`stream` records what enters block 0, then yields one `Step` per block. While a step is open its
user reads statistics of the block's inputs and writes new weights into the working copy; asking for
the next step runs the changed block, so the inputs of block i+1 come from the pruned block i, and
overwrites the hidden states. With `Step.stages` that is one forward, which stops wherever weight
matrices are to be pruned and goes on through them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NonFinite
from secateur.methods.statistics import OF_DENSE
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import WeightMatrix, signature, weight_matrices
from secateur.models.replay import Call
from secateur.models.stream.forward import Batch, BlockRun, ForwardPass
from secateur.models.stream.observe import CalibrationStatistics, observe
from secateur.models.stream.paused import InputGroups, PausedPass, find_groups
from secateur.system.tensors import is_finite

PROBE_TOKENS = 256
"""On how many calibration tokens, about, the output error of every weight matrix is measured."""
Outputs = Callable[[int], Iterator[tuple[int, Tensor]]]


class Step:
    """One block with its calibration inputs. `block` is a working copy; `sites` are views of its
    weight matrices, by name.
    """

    def __init__(
        self,
        flow: ForwardPass,
        dense: ForwardPass | None,
        groups: dict[Any, InputGroups],
        *,
        last: bool,
    ) -> None:
        self._flow, self._dense, self._groups = flow, dense, groups
        self.index, self.last = flow.index, last
        self.name = flow.run.language_model.block_name(flow.index)
        self.seconds = flow.run.seconds
        self.block = flow.replicas[0]
        self.sites = weight_matrices(self.block)
        self._left = False  # whether the hidden states are those behind the block already
        self._targets: HiddenStateStore | None = None  # what the dense block gives on dense inputs

    @property
    def device(self) -> torch.device:
        """Where the working copy lies."""
        return next(self.block.parameters()).device

    def observe(
        self, need: Iterable[str], probe: int, only: Collection[str] | None = None
    ) -> CalibrationStatistics:
        """Run the block as it is now once, and look at the inputs of its weight matrices, or of
        those in `only`.

        The probe takes evenly spaced tokens of the first batch, about `probe` of them. Raises
        NonFinite.
        """
        return self._timed(observe(self._flow, self._dense, tuple(need), probe, only))

    def stages(
        self,
        need: Iterable[str],
        probe: int,
        only: Collection[str],
        *,
        one_pass: bool,
        sequential: bool,
        again: bool,
    ) -> Iterator[tuple[list[str], CalibrationStatistics]]:
        """The weight matrices in `only`, some at a time, with what is seen of their inputs; before
        the next, they are pruned.

        In one pass, those that share an input come together, in the order in which a forward
        reaches them, and it goes on through what was pruned; to the end of the block, unless the
        block will be run `again`. In two, all come at once, and inputs are those of the dense
        block; or, if `sequential`, in stages with a forward for each.
        """
        groups = self._input_groups() if one_pass else None
        if groups and groups.plain:
            if unreached := [name for name in groups.unreached if name in only]:
                yield unreached, CalibrationStatistics({}, {})  # before any forward starts
            stages = [kept for group in groups.order if (kept := [n for n in group if n in only])]
            yield from self._paused(stages, tuple(need), probe, leave=not again and not self.last)
            return
        for group in self.groups() if sequential else [list(self.sites)]:
            if kept := [name for name in group if name in only]:
                yield kept, self.observe(need, probe, kept)

    def _paused(
        self, stages: Sequence[list[str]], need: Collection[str], probe: int, *, leave: bool
    ) -> Iterator[tuple[list[str], CalibrationStatistics]]:
        """Every stage of one forward, which goes on through what is pruned, to its end if it is to
        `leave` the block.
        """
        paired = self._dense if OF_DENSE.intersection(need) else None
        with closing(PausedPass(self._flow, paired, stages)) as paused:
            for number, names in enumerate(stages):
                yield names, self._timed(paused.statistics(number, need, probe))
                self._flow.align()
            started = perf_counter()
            if paired:
                self._targets = _stored(paired, paused.dense_outputs, _room_for(paired))
            if leave:
                _stored(self._flow, paused.outputs, self._flow.hidden)
            self._left = leave
            self.seconds.forward += perf_counter() - started

    def _timed(self, statistics: CalibrationStatistics) -> CalibrationStatistics:
        self.seconds.forward += statistics.forward_seconds
        self.seconds.statistics += statistics.statistics_seconds
        return statistics

    def first(self) -> tuple[Tensor, Call]:
        """The hidden states of the first batch as they enter the block, and its call."""
        return self._flow.hidden[0].to(self.device), self._flow.calls[0][self.index]

    def windows(self) -> list[tuple[Tensor, list[Call]]]:
        """The hidden states of every batch as they enter the block, and the calls of all blocks of
        the model.
        """
        batches = zip(self._flow.hidden, self._flow.calls, strict=True)
        return [(hidden.to(self.device), calls) for hidden, calls in batches]

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead of the working copy; it may have other shapes."""
        self._flow.replace(block)

    def batches(self) -> list[Batch]:
        """The inputs of the block, and what the dense block gives on the dense inputs; `stream`
        with `dense` only.
        """
        started = perf_counter()
        targets = self._dense_outputs()
        self.seconds.forward += perf_counter() - started
        calls = (calls[self.index] for calls in self._flow.calls)
        return [Batch(*parts) for parts in zip(self._flow.hidden, calls, targets, strict=True)]

    def groups(self) -> list[list[str]]:
        """The weight matrices in the order in which the block reaches them, those that share an
        input together.

        Those that the first batch does not reach come last.
        """
        groups = self._input_groups()
        return [*groups.order, *([groups.unreached] if groups.unreached else [])]

    def leave(self) -> None:
        """Run the block over all batches, where that is not done yet; outputs replace inputs."""
        started = perf_counter()
        if self._dense:
            self._dense.hidden = self._dense_outputs()
        if not self._left:
            self._flow.align()
            _stored(self._flow, self._flow.outputs, self._flow.hidden)
        self.seconds.forward += perf_counter() - started

    def _dense_outputs(self) -> HiddenStateStore:
        """What the dense block gives on the dense inputs, batch by batch; computed once."""
        assert self._dense
        if self._targets is None:
            self._targets = _stored(self._dense, self._dense.outputs, _room_for(self._dense))
        return self._targets

    @torch.no_grad()
    def _input_groups(self) -> InputGroups:
        """Which weight matrices share an input, asked of one forward for each kind of block."""
        run = self._flow.run
        kind = signature(run.language_model.blocks[self.index])
        if kind not in self._groups:
            self._groups[kind] = run.ranks.same(lambda: find_groups(self.block, *self.first()))
        return self._groups[kind]


def _room_for(flow: ForwardPass) -> HiddenStateStore:
    """Room for what the block at hand makes of every batch."""
    return HiddenStateStore(flow.run.spill, flow.hidden)


@torch.no_grad()
def _stored(flow: ForwardPass, outputs: Outputs, into: HiddenStateStore) -> HiddenStateStore:
    """Put what leaves the block into a store as it comes, on all devices at once."""

    def store(share: int) -> None:
        for number, output in outputs(share):
            into[number] = output

    flow.each(store)
    return into


def stream(
    run: BlockRun,
    *,
    dense: bool = False,
    kept: Collection[int] | None = None,
    finished: Sequence[nn.Module] = (),
) -> Iterator[Step]:
    """The blocks in order with the inputs that the tokens of the run give them; those in `kept`, or
    all.

    With `dense`, a second stream goes through the dense blocks, for the statistic "cross" and for
    `Step.batches`. The first blocks may be `finished`: these stand in for them, and no step is
    given.
    """
    # Not under no_grad as a whole: torch's wrapper of a generator would hold on to the step before.
    blocks, groups = run.language_model.blocks, dict[Any, InputGroups]()
    flow = ForwardPass(run)
    beside = flow.beside() if dense else None
    order = list(range(len(blocks))) if kept is None else sorted(kept)
    ready = dict(zip(order, finished, strict=False))
    for index in range(order[-1] + 1):
        if beside:
            beside.close()  # before there is another block
        if index in order:
            flow.open(index, ready.get(index))
        if beside:
            beside.open(index, blocks[index])
        if index in order:
            step = Step(flow, beside, groups, last=index == order[-1])
            if index not in ready:
                yield step
            if not step.last:
                step.leave()
            del step  # its copy of the block would live beside the next one
        elif beside:
            beside.hidden = _stored(beside, beside.outputs, _room_for(beside))


def put(step: Step, name: str, weight: Tensor, targets: Mapping[str, WeightMatrix]) -> None:
    """Write a new weight `[out, in]` into both copies of the block, rounded as it is stored. Raises
    NonFinite.
    """
    stored = weight.to(targets[name].stored.dtype)
    if not is_finite(stored):
        raise NonFinite(
            f"The pruned weights of {step.name}.{name} do not fit {stored.dtype}. "
            "Use another method, or --skip it."
        )
    targets[name].put(stored)
    step.sites[name].put(stored)


def refuse_non_finite_weights(step: Step, original: Mapping[str, WeightMatrix]) -> None:
    """Raise NonFinite for NaN or Inf in the stored weights of a block."""
    for name, matrix in original.items():
        if not is_finite(matrix.stored):
            raise NonFinite(
                f"The weights of {step.name}.{name} hold NaN or Inf. Fetch the checkpoint again."
            )
