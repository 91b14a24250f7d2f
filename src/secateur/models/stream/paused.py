"""Forwards that stop inside a block: one pass over the calibration tokens instead of two.

The weight matrices of a block are reached in stages, each those that read one input. The forward
of every batch runs as far as a stage and is left there with all it holds; when all have come, the
matrices of the stage are pruned from the inputs that wait for them, and the forwards go on through
the pruned weights. Nothing runs twice, and every matrix is pruned on the inputs it will really see.

What is left standing is the call stack of an ordinary forward, in a greenlet, so that no family's
code is changed. Which matrices make a stage is asked of one whole forward; a block where
that has no plain answer is left to two passes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import NamedTuple
from weakref import ref

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from secateur.errors import UnsupportedModel
from secateur.models import experts
from secateur.models.hooks import Reached, visited
from secateur.models.matrices import weight_matrices
from secateur.models.replay import Call, run_block
from secateur.models.stream.forward import ForwardPass
from secateur.models.stream.observe import CalibrationStatistics, Watch, merged, probed


class InputGroups(NamedTuple):
    """The matrices of a block, in groups that share an input, in the `order` of a forward pass.

    All experts' matrices of one kind are one group. Forwards can be stopped at each in turn if
    `plain`: not where one is called twice, or where experts are modules of their own, of which
    every batch takes others.
    """

    order: list[list[str]]
    unreached: list[str]
    plain: bool


def find_groups(block: nn.Module, hidden: Tensor, call: Call) -> InputGroups:
    """The stages of a block, asked of one forward."""
    known = weight_matrices(block)
    reached: list[Reached] = []
    with visited(block, reached.extend):
        run_block(block, hidden, call)
    first = {name: x for name, x, _ in reversed(reached)}  # of a matrix that is called twice
    groups: dict[object, list[str]] = {}
    for name in dict.fromkeys(one.name for one in reached):
        parameter, x = known[name].parameter, first[name]
        if known[name].expert:
            groups[parameter] = [n for n, one in known.items() if one.parameter == parameter]
        else:
            groups.setdefault((id(x), x._version), []).append(name)
    order = list(groups.values())
    inside = {name for stage in order for name in stage}
    plain = len(first) == len(reached) and not experts.has_list(block)
    return InputGroups(order, [name for name in known if name not in inside], plain)


class _Forward:
    """One batch on its way through the block: the last stage reached, and its inputs there."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.stage, self.waiting = -1, list[Reached]()
        self.seen: dict[int, ref[Tensor]] = {}  # the input of every stage passed
        self.output: Tensor | None = None
        self.stack = greenlet(run)
        self.stack.gr_context = copy_context()


class PausedForwards:
    """The forwards of some batches through one block, all stopped at one stage, in one thread.

    `starts` holds what runs the block, by the number of the batch. Raises UnsupportedModel where a
    batch takes another way through the block than the one that the stages were found on.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        starts: Mapping[int, Callable[[], Tensor]],
    ) -> None:
        self.forwards = {number: _Forward(start) for number, start in starts.items()}
        self._stage_of = {name: number for number, stage in enumerate(stages) for name in stage}
        self._running: _Forward | None = None
        self._hooks = ExitStack()  # as long as a call of a module stands, its hooks must not change
        self._hooks.enter_context(visited(block, self._visit))

    def inputs(self, stage: int) -> Iterator[tuple[int, list[Reached]]]:
        """(batch, what it has reached) of every forward once it has come to `stage`.

        The first matrix of a shared input stands for all. A forward that misses the stage has none.
        """
        for number, forward in self.forwards.items():
            while forward.stage < stage and forward.output is None:
                self._go_on(forward)
            yield number, forward.waiting if forward.stage == stage else []

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """(batch, what the block returns), each forward run to its end and forgotten."""
        while self.forwards:
            number = next(iter(self.forwards))
            forward = self.forwards.pop(number)
            while forward.output is None:
                self._go_on(forward)
            yield number, forward.output

    def close(self) -> None:
        """Give up what has not ended."""
        for forward in self.forwards.values():
            forward.stack.throw(GreenletExit)
        self.forwards.clear()
        self._hooks.close()

    def _go_on(self, forward: _Forward) -> None:
        """Run a forward to its next stage, or to its end."""
        self._running, forward.stack.parent = forward, getcurrent()
        output = forward.stack.switch()
        forward.output = output if forward.stack.dead else None

    def _visit(self, reached: list[Reached]) -> None:
        """Inside a forward: wait for `_go_on` where it comes to another stage."""
        forward = self._running
        reached = [one for one in reached if one.name in self._stage_of]
        if not reached or forward is None:
            return
        name, x, _ = reached[0]
        stage = self._stage_of[name]
        if stage > forward.stage:
            forward.stage, forward.waiting, forward.seen[stage] = stage, reached, ref(x)
            assert forward.stack.parent is not None
            forward.stack.parent.switch()
        elif stage not in forward.seen or forward.seen[stage]() is not x:
            raise UnsupportedModel(
                f"{name} is reached in another order, or with another input, by some batches than "
                "by the first. Use --passes two."
            )


class PausedPass:
    """All batches of a pass, stopped within the block at hand, and those of a `dense` stream.

    `stages` are the groups of weight matrices at which they stop, in order.
    """

    def __init__(
        self, flow: ForwardPass, dense: ForwardPass | None, stages: Sequence[list[str]]
    ) -> None:
        self.flow, self.stages = flow, stages
        streams = [flow, dense] if dense else [flow]
        self._forwards = flow.each(lambda share: [self._start(each, share) for each in streams])

    def _start(self, stream: ForwardPass, share: int) -> PausedForwards:
        starts = {n: partial(stream.forward, share, n) for n in stream.batches_of(share)}
        return PausedForwards(stream.replicas[share], self.stages, starts)

    @torch.no_grad()
    def statistics(self, stage: int, need: Collection[str], probe: int) -> CalibrationStatistics:
        """What is seen where all forwards have come to a stage. Raises NonFinite."""
        names = self.stages[stage]
        fused = weight_matrices(self.flow.replicas[0])[names[0]].expert
        shared = {name: name if fused else names[0] for name in names}

        def collect(share: int) -> Watch:
            watch = Watch(need)
            ours, *theirs = self._forwards[share]
            # Which tokens reach an expert differs between two models: no pairs to sum over.
            pairs = theirs[0].inputs(stage) if theirs and not fused else None
            for number, reached in ours.inputs(stage):
                dense = {name: x for name, x, _ in next(pairs)[1]} if pairs else {}
                counted = self.flow.counted_in(number)
                watch.next_batch(probed(self.flow, probe, number), dense, counted)
                watch.see_all(reached)
            return watch

        started = perf_counter()
        return merged(self.flow, self.flow.each(collect), shared, perf_counter() - started)

    def outputs(self, share: int) -> Iterator[tuple[int, Tensor]]:
        """(batch, what the block returns) of a device, each forward run to its end."""
        return self._forwards[share][0].outputs()

    def dense_outputs(self, share: int) -> Iterator[tuple[int, Tensor]]:
        return self._forwards[share][1].outputs()

    def close(self) -> None:
        """Give up what has not ended."""
        self.flow.each(lambda share: [forwards.close() for forwards in self._forwards[share]])
