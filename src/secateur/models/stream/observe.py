"""What is seen of the inputs of a block's weight matrices, over all devices and ranks.

`observe` runs the block at hand once and sums over the calibration tokens, device by device;
`paused` sees the same in the one forward pass that goes on through what is pruned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import NonFinite, UnsupportedModel
from secateur.methods.statistics import OF_DENSE, Stats
from secateur.models.hooks import Reached, visited
from secateur.models.stream.forward import ForwardPass, linear_inputs
from secateur.system.tensors import is_finite


class CalibrationStatistics(NamedTuple):
    """What was seen of a block's inputs, by weight matrix; one that saw no token is missing.

    `stats`, one for all matrices that share an input; `probes`, some inputs `[tokens, in]` float32.
    """

    stats: dict[str, Stats]
    probes: dict[str, Tensor]


@torch.no_grad()
def observe(
    flow: ForwardPass,
    dense: ForwardPass | None,
    need: Collection[str],
    probe: int,
    only: Collection[str] | None,
) -> CalibrationStatistics:
    """Run the block as it is now once, and sum up the statistics `need` of its inputs.

    `dense`: the stream through the dense model, for statistics of both; `only`, `probe`: see
    `Step.observe`. Without statistics to gather, the first batch is enough. Raises NonFinite.
    """
    paired = dense if OF_DENSE.intersection(need) else None

    def look(share: int) -> Watch:
        watch = Watch(need, only)
        with visited(flow.replicas[share], watch.see_all):
            for number in flow.batches_of(share)[: None if need else 1]:
                pairs = linear_inputs(paired, share, number, only) if paired else {}
                watch.next_batch(probed(flow, probe, number), pairs, flow.counted_in(number))
                flow.forward(share, number)
        return watch

    started = perf_counter()
    flow.align()
    watches = flow.each(look)
    ranks = flow.run.ranks.together(lambda: [watch.shared for watch in watches])
    shared = {name: first for rank in ranks for part in rank for name, first in part.items()}
    return merged(flow, watches, shared, perf_counter() - started)


def probed(flow: ForwardPass, probe: int, number: int) -> int:
    """How many tokens of a batch are kept to measure errors on: only of the very first."""
    return probe if number == 0 and flow.run.ranks.first else 0


def merged(
    flow: ForwardPass, watches: Sequence[Watch], shared: Mapping[str, str], seconds: float
) -> CalibrationStatistics:
    """What all devices and ranks saw together, after `seconds`, which the run counts.

    `shared`: of every weight matrix, the one that reads the same input first. Raises NonFinite.
    """
    stats, probes = dict(watches[0].stats), watches[0].probes
    for watch in watches[1:]:
        for name, sums in watch.stats.items():
            stats[name] = stats[name] + sums if name in stats else sums
    stats = flow.run.ranks.add(stats)
    name = flow.run.language_model.block_name(flow.index)
    flow.run.ranks.together(lambda: refuse_non_finite(name, stats, probes))
    adding = sum(watch.seconds for watch in watches)
    flow.run.seconds.statistics += adding
    flow.run.seconds.forward += seconds - adding
    return CalibrationStatistics(
        {name: stats[first] for name, first in shared.items() if first in stats},
        {name: probes[first] for name, first in shared.items() if first in probes},
    )


class Watch:
    """Sees the inputs of weight matrices on one device; those that read one tensor share sums.

    Within a batch, a matrix whose input is a tensor already seen belongs to the one that saw it
    first. The tensors of a batch are held until the next, so that no identity is reused.
    """

    def __init__(self, need: Collection[str], only: Collection[str] | None = None) -> None:
        self.need, self.only = need, only
        self.stats: dict[str, Stats] = {}
        self.probes: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self.seconds = 0.0
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._probe = 0
        self._dense: dict[str, Tensor] = {}
        self._counted: Tensor | None = None

    def next_batch(
        self, probe: int, dense: dict[str, Tensor], counted: Tensor | None = None
    ) -> None:
        """Begin a batch: keep `probe` tokens of it; `dense` has its inputs in the dense model, and
        `counted` `[windows, length]` says which tokens are seen at all.
        """
        self._seen.clear()
        self._probe, self._dense, self._counted = probe, dense, counted

    def see_all(self, reached: Sequence[Reached]) -> None:
        """Add what a forward has brought to some weight matrices."""
        for one in reached:
            self.see(*one)

    def see(self, name: str, x: Tensor, tokens: Tensor | None = None) -> None:
        """Add an input `[…, in]` that a forward has brought to a weight matrix, of `tokens` as
        `Reached` has them.
        """
        if self.only is not None and name not in self.only:
            return
        _settle(x)  # what was launched before is the forward pass's
        started = perf_counter()
        first, _ = self._seen.setdefault((id(x), x._version), (name, x))
        if self.shared.setdefault(name, first) != first:
            raise UnsupportedModel(
                f"{name} shares its input with other matrices in one batch and not in the next."
            )
        if first == name and x.numel():
            self._add(name, x, tokens)
        _settle(x)
        self.seconds += perf_counter() - started

    def _add(self, name: str, inputs: Tensor, tokens: Tensor | None) -> None:
        x = chosen_tokens(name, inputs, self._counted, tokens)
        if not len(x):
            return
        if self.need:
            dense = self._dense.get(name)
            if dense is not None:
                dense = chosen_tokens(name, dense.reshape(inputs.shape), self._counted)
            add = self.stats[name].add if name in self.stats else Stats.of
            self.stats[name] = add(x, self.need, dense)
        if self._probe:
            step = -(-len(x) // self._probe)
            kept = x[::step].to(torch.float32, copy=True)  # a view would hold all of x
            before = self.probes.get(name)
            self.probes[name] = kept if before is None else torch.cat([before, kept])


def chosen_tokens(
    name: str, x: Tensor, counted: Tensor | None, tokens: Tensor | None = None
) -> Tensor:
    """Those of the inputs x `[…, in]` of a matrix whose tokens count, `[tokens, in]`.

    `counted` is `[windows, length]` bool, None for all; x is `[…, windows, length, in]`, or has a
    one between these two, or has them in one, or has those `tokens` that reach an expert. Raises
    UnsupportedModel for any other arrangement.
    """
    if counted is None:
        return x.reshape(-1, x.shape[-1])
    rows = counted.to(x.device)
    if tokens is not None and len(tokens) == rows.numel():
        return x[rows.flatten()[tokens]]
    if x.dim() == 4 and (len(x), *x.shape[1:3]) == (len(rows), 1, rows.shape[1]):
        x = x.squeeze(1)  # as if of one head: the compressed keys and values of DeepSeek
    if x.shape[-3:-1] == rows.shape:
        return x[..., rows, :].reshape(-1, x.shape[-1])
    if x.dim() == 2 and len(x) == rows.numel():
        return x[rows.flatten()]
    raise UnsupportedModel(
        f"Which tokens enter {name} is not known: its input is {list(x.shape)} for windows of "
        f"{list(rows.shape)} tokens. Leave --calibration-on out."
    )


def _settle(x: Tensor) -> None:
    """Wait until the device of a tensor has done what it was told."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def refuse_non_finite(block: str, stats: Mapping[str, Stats], probes: Mapping[str, Tensor]) -> None:
    """Raise NonFinite for NaN or Inf in what was seen of a block's inputs."""
    sums = ((name, total) for name, each in stats.items() for total in each.sums.values())
    for name, tensor in (*sums, *probes.items()):
        if not is_finite(tensor):
            raise NonFinite(
                f"NaN or Inf in the activations that enter {block}.{name}. The model overflows on "
                "this text in this dtype; try --dtype float32, and check the checkpoint with "
                "'secateur inspect'."
            )
