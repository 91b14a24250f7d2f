"""What is seen of the inputs of a block's sites, over all devices and ranks, in forwards of the
block at hand.

Either a forward of its own (`observe`), or the one forward that a block gets, which stops wherever
sites are to be pruned and goes on through them (`suspended`). Statistics are sums, added in the
order of the devices.

`Watch` is what is seen on one device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import NonFinite, UnsupportedModel
from secateur.methods.statistics import OF_DENSE, Stats
from secateur.models.hooks import recorded_inputs
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import weight_matrices
from secateur.models.stream.forward import ForwardPass
from secateur.models.stream.paused import PausedForwards
from secateur.system.tensors import is_finite


@torch.no_grad()
def observe(
    flow: ForwardPass, index: int, need: Iterable[str], probe: int, only: Collection[str] | None
) -> CalibrationStatistics:
    """One forward of the block as it is now, in which the inputs of its sites are seen, or those in
    `only`.
    """
    need = tuple(need)
    watches = [Watch(need, only) for _ in flow.devices]

    def forward(share: int) -> None:
        watch = watches[share]
        with recorded_inputs(flow.replicas[share], watch.see):
            for number in flow.of(share):
                dense = _dense_inputs(flow, index, share, number, need, only)
                watch.next_batch(_probed(flow, probe, number), dense)
                flow.forward(index, share, number)

    started = perf_counter()
    flow.align()
    # Without statistics to gather, the first batch is enough for the probe.
    if need:
        flow.each(forward)
    elif flow.hidden:
        with recorded_inputs(flow.replicas[0], watches[0].see):
            watches[0].next_batch(probe, {})
            flow.forward(index, 0, 0)
    shared: dict[str, str] = {}
    for found in flow.ranks.together(lambda: [watch.shared for watch in watches]):
        for part in found:
            shared |= part
    return _merged(flow, index, watches, shared, perf_counter() - started)


def suspended(
    flow: ForwardPass,
    index: int,
    stages: Sequence[list[str]],
    need: Iterable[str],
    probe: int,
    *,
    finish: bool,
) -> Iterator[tuple[list[str], CalibrationStatistics]]:
    """Each stage with what was seen of the inputs of its sites; by the next, they are pruned.

    With `finish`, the forwards go on to their end, and the hidden states are those behind the
    block.
    """
    need = tuple(need)
    paired = flow.dense is not None and bool(OF_DENSE.intersection(need))

    def start(share: int) -> tuple[PausedForwards, PausedForwards | None]:
        ours = {number: partial(flow.forward, index, share, number) for number in flow.of(share)}
        theirs = {
            number: partial(flow.dense_forward, index, share, number) for number in flow.of(share)
        }
        return (
            PausedForwards(flow.replicas[share], stages, ours),
            PausedForwards(flow.originals[share], stages, theirs) if paired else None,
        )

    forwards = flow.each(start)
    try:
        for number, stage in enumerate(stages):
            yield stage, _collected(flow, index, forwards, number, need, probe)
            flow.align()
        _finish(flow, index, forwards, finish=finish)
    finally:
        flow.each(lambda share: [held.close() for held in forwards[share] if held])


@torch.no_grad()
def _collected(
    flow: ForwardPass,
    index: int,
    forwards: Sequence[tuple[PausedForwards, PausedForwards | None]],
    stage: int,
    need: tuple[str, ...],
    probe: int,
) -> CalibrationStatistics:
    names = forwards[0][0].stages[stage]
    fused = weight_matrices(flow.replicas[0])[names[0]].expert
    shared = {name: name if fused else names[0] for name in names}

    def collect(share: int) -> Watch:
        watch = Watch(need, None)
        ours, theirs = forwards[share]
        # Which tokens reach an expert differs between the two models, so there are no pairs to sum
        # over.
        twins = theirs.inputs(stage) if theirs and not fused else None
        for number, reached in ours.inputs(stage):
            dense = dict(next(twins)[1]) if twins else {}
            watch.next_batch(_probed(flow, probe, number), dense)
            for name, x in reached:
                watch.see(name, x)
        return watch

    started = perf_counter()
    return _merged(flow, index, flow.each(collect), shared, perf_counter() - started)


@torch.no_grad()
def _finish(
    flow: ForwardPass,
    index: int,
    forwards: Sequence[tuple[PausedForwards, PausedForwards | None]],
    *,
    finish: bool,
) -> None:
    def end(share: int) -> None:
        ours, theirs = forwards[share]
        if theirs and targets:
            for number, output in theirs.outputs():
                targets[number] = output
        for number, output in ours.outputs() if finish else ():
            flow.hidden[number] = output

    started = perf_counter()
    targets = (
        HiddenStateStore(flow.hidden.folder, flow.dense) if flow.dense and forwards[0][1] else None
    )
    flow.each(end)
    flow.done = finish
    flow.targets = targets or flow.targets
    flow.seconds.forward += perf_counter() - started


def _probed(flow: ForwardPass, probe: int, number: int) -> int:
    """How many tokens of a batch are kept to measure errors on: only of the very first."""
    return probe if number == 0 and flow.ranks.first else 0


def _merged(
    flow: ForwardPass, index: int, watches: Sequence[Watch], shared: dict[str, str], seconds: float
) -> CalibrationStatistics:
    """What all devices saw together, in `seconds`. Raises NonFinite."""
    statistics = sum(watch.seconds for watch in watches)
    flow.seconds.forward += seconds - statistics
    flow.seconds.statistics += statistics
    total, probes = dict(watches[0].stats), watches[0].probes
    for watch in watches[1:]:
        for name, stats in watch.stats.items():
            total[name] = total[name] + stats if name in total else stats
    total = flow.ranks.add(total)
    flow.ranks.together(
        lambda: refuse_non_finite(flow.language_model.block_name(index), total, probes)
    )
    return CalibrationStatistics(
        {name: total[first] for name, first in shared.items() if first in total},
        {name: probes[first] for name, first in shared.items() if first in probes},
        shared,
    )


def _dense_inputs(
    flow: ForwardPass,
    index: int,
    share: int,
    number: int,
    need: tuple[str, ...],
    only: Collection[str] | None,
) -> dict[str, Tensor]:
    """The inputs of the block's linear layers in the dense model, for one batch, those in `only`;
    not of experts.

    Which tokens reach an expert differs between the two models, so there are no pairs to sum over.
    """
    found: dict[str, Tensor] = {}
    if flow.dense is None or not OF_DENSE.intersection(need):
        return found
    block = flow.originals[share]
    linear = {
        name
        for name in weight_matrices(block)
        if not any(part.isdigit() for part in name.split("."))
    }
    if not (linear := linear if only is None else linear & set(only)):
        return found
    with recorded_inputs(block, lambda name, x: found.update({name: x} if name in linear else {})):
        flow.dense_forward(index, share, number)
    return found


class CalibrationStatistics(NamedTuple):
    """What was seen of a block's inputs, by site; a site that saw no token is missing.

    `stats`, one for all sites that share an input; `probes`, some inputs `[tokens, in]` to measure
    errors on; `shared`, for every site the one that read the same tensor first, in the order in
    which they were reached.
    """

    stats: dict[str, Stats]
    probes: dict[str, Tensor]
    shared: dict[str, str]


class Watch:
    """Sees the inputs of sites on one device: one set of sums for all sites that read the same
    tensor.

    Sharing is observed, not declared: within a batch, a site whose input is a tensor already seen
    belongs to the site that saw it first. The tensors of a batch are held until the next, so that
    no identity is reused.
    """

    def __init__(self, need: tuple[str, ...], only: Collection[str] | None) -> None:
        self.need, self.only = need, only
        self.stats: dict[str, Stats] = {}
        self.probes: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.seconds = 0.0
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._probe = 0
        self._dense: dict[str, Tensor] = {}

    def next_batch(self, probe: int, dense: dict[str, Tensor]) -> None:
        """Forget the tensors of the batch before; `dense` are the dense model's inputs of the next,
        by site.
        """
        self._seen.clear()
        self._probe, self._dense = probe, dense

    def see(self, name: str, x: Tensor) -> None:
        if self.only is not None and name not in self.only:
            return
        _settle(x)  # what was launched before is the forward pass's
        started = perf_counter()
        first, _ = self._seen.setdefault((id(x), x._version), (name, x))
        if self.shared.setdefault(name, first) != first:
            raise UnsupportedModel(
                f"{name} shares its input with other sites in one batch and not in the next."
            )
        if first == name:
            x = x.reshape(-1, x.shape[-1])
            if self.need and len(x):
                dense = self._dense.get(name)
                dense = None if dense is None else dense.reshape(x.shape)
                held = self.stats.get(name)
                self.stats[name] = (
                    held.add(x, self.need, dense) if held else Stats.of(x, self.need, dense)
                )
            if self._probe and len(x):
                kept = x[:: -(-len(x) // self._probe)].to(
                    torch.float32, copy=True
                )  # a view would hold all of x
                self.probes[name] = (
                    torch.cat([self.probes[name], kept]) if name in self.probes else kept
                )
        _settle(x)
        self.seconds += perf_counter() - started


def _settle(x: Tensor) -> None:
    """Wait until the device of a tensor has done what it was told."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def refuse_non_finite(block: str, stats: dict[str, Stats], probes: dict[str, Tensor]) -> None:
    for name, tensor in (
        *((name, tensor) for name, found in stats.items() for tensor in found.sums.values()),
        *probes.items(),
    ):
        if not is_finite(tensor):
            raise NonFinite(
                f"NaN or Inf in the activations that enter {block}.{name}. The model overflows on this text in "
                "this dtype; try --dtype float32, and check the checkpoint with 'secateur inspect'."
            )
