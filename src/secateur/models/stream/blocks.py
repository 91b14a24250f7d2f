"""The blocks in order, each with its calibration inputs: data only moves forward.

`stream` records what enters block 0, then yields one `Step` per block. While a step is open its
user reads statistics of the block's inputs and writes new weights into the working copy; the next
step begins with a run of the changed block, whose outputs overwrite its inputs. With `Step.stages`
that is one forward pass, which stops wherever weight matrices are to be pruned.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.methods.statistics import OF_DENSE
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import signature, weight_matrices
from secateur.models.stream.forward import Batch, BlockRun, ForwardPass
from secateur.models.stream.observe import CalibrationStatistics, observe
from secateur.models.stream.paused import InputGroups, PausedPass, find_groups

PROBE_TOKENS = 256
"""On how many calibration tokens, about, the output error of every weight matrix is measured."""


class Step:
    """One block with its calibration inputs; `block` is a copy, `matrices` views of its own."""

    def __init__(
        self,
        inputs: ForwardPass,
        dense: ForwardPass | None,
        groups: dict[Any, InputGroups],
        *,
        last: bool,
    ) -> None:
        self.inputs, self._dense, self._groups, self.last = inputs, dense, groups, last
        self.run, self.index, self.seconds = inputs.run, inputs.index, inputs.run.seconds
        self.name = self.run.language_model.block_name(self.index)
        self.block = inputs.replicas[0]
        self.device = next(self.block.parameters()).device
        self.matrices = weight_matrices(self.block)
        self._left = False  # whether the hidden states are those behind the block already
        self._targets: HiddenStateStore | None = None  # what the dense block gives on dense inputs

    def observe(
        self, need: Iterable[str], probe: int, only: Collection[str] | None = None
    ) -> CalibrationStatistics:
        """Run the block as it is now once, and sum up what enters its matrices, or `only` some.

        About `probe` evenly spaced tokens of the first batch are kept. Raises NonFinite.
        """
        return observe(self.inputs, self._dense, tuple(need), probe, only)

    def stages(
        self,
        need: Collection[str],
        only: Collection[str],
        *,
        one_pass: bool,
        sequential: bool,
        again: bool,
    ) -> Iterator[tuple[list[str], CalibrationStatistics]]:
        """The weight matrices in `only`, some at a time, with the statistics of their inputs; they
        are pruned before the next ones come.

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
            yield from self._paused(stages, need, leave=not again and not self.last)
            return
        for group in self.groups() if sequential else [list(self.matrices)]:
            if kept := [name for name in group if name in only]:
                yield kept, self.observe(need, PROBE_TOKENS, kept)

    def _paused(
        self, stages: Sequence[list[str]], need: Collection[str], *, leave: bool
    ) -> Iterator[tuple[list[str], CalibrationStatistics]]:
        """Every stage of one forward pass, which goes on to the block's end if it is to `leave`."""
        paired = self._dense if OF_DENSE.intersection(need) else None
        with closing(PausedPass(self.inputs, paired, stages)) as paused:
            for number, names in enumerate(stages):
                yield names, paused.statistics(number, need, PROBE_TOKENS)
                self.inputs.align()
            with self.seconds.counted("forward"):
                if paired:
                    self._targets = paired.aside(paused.dense_outputs)
                if leave:
                    self.inputs.advance(paused.outputs)
            self._left = leave

    def batches(self) -> list[Batch]:
        """The inputs of the block and the dense block's outputs; only for `stream(dense=True)`."""
        with self.seconds.counted("forward"):
            targets = self._dense_outputs()
        calls = (calls[self.index] for calls in self.inputs.calls)
        parts = zip(self.inputs.hidden, calls, targets, self.inputs.masks(), strict=True)
        return [Batch(*part) for part in parts]

    def groups(self) -> list[list[str]]:
        """The matrices in the order in which the block reaches them, those with one input together;
        last come those that the first batch does not reach.
        """
        groups = self._input_groups()
        return [group for group in (*groups.order, groups.unreached) if group]

    def leave(self) -> None:
        """Run the block over all batches, where that is not done yet; outputs replace inputs."""
        with self.seconds.counted("forward"):
            if self._dense:
                self._dense.hidden = self._dense_outputs()
            if not self._left:
                self.inputs.align()
                self.inputs.advance(self.inputs.outputs)

    def _dense_outputs(self) -> HiddenStateStore:
        """What the dense block gives on the dense inputs, batch by batch; computed once."""
        assert self._dense
        if self._targets is None:
            self._targets = self._dense.aside(self._dense.outputs)
        return self._targets

    @torch.no_grad()
    def _input_groups(self) -> InputGroups:
        """Which weight matrices share an input, asked of one forward for each kind of block."""
        kind = signature(self.run.language_model.blocks[self.index])
        if kind not in self._groups:
            ask = partial(find_groups, self.block, *self.inputs.first())
            self._groups[kind] = self.run.ranks.same(ask)
        return self._groups[kind]


def stream(
    run: BlockRun,
    *,
    dense: bool = False,
    kept: Collection[int] | None = None,
    finished: Sequence[nn.Module] = (),
) -> Iterator[Step]:
    """The blocks in order, all or those in `kept`, with the inputs that the run's tokens give them.

    With `dense`, a second stream goes through the dense blocks, for the statistic "cross" and for
    `Step.batches`. The first blocks may be `finished`: these take their place and are not given.
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
            beside.hidden = beside.aside(beside.outputs)
