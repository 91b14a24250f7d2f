"""What is seen of the inputs of a block's sites while batches go through it, on one device."""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import NonFinite, UnsupportedModel
from secateur.stats import Stats, is_finite


class Observed(NamedTuple):
    """What was seen of a block's inputs, by site; a site that saw no token is missing.

    `stats`, one for all sites that share an input; `probes`, some inputs `[tokens, in]` to measure errors on;
    `shared`, for every site the one that read the same tensor first, in the order in which they were reached.
    """

    stats: dict[str, Stats]
    probes: dict[str, Tensor]
    shared: dict[str, str]


class Watch:
    """Sees the inputs of sites on one device: one set of sums for all sites that read the same tensor.

    Sharing is observed, not declared: within a batch, a site whose input is a tensor already seen belongs to
    the site that saw it first. The tensors of a batch are held until the next, so that no identity is reused.
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
        """Forget the tensors of the batch before; `dense` are the dense model's inputs of the next, by site."""
        self._seen.clear()
        self._probe, self._dense = probe, dense

    def see(self, name: str, x: Tensor) -> None:
        if self.only is not None and name not in self.only:
            return
        _settle(x)  # what was launched before is the forward pass's
        started = perf_counter()
        first, _ = self._seen.setdefault((id(x), x._version), (name, x))
        if self.shared.setdefault(name, first) != first:
            raise UnsupportedModel(f"{name} shares its input with other sites in one batch and not in the next.")
        if first == name:
            x = x.reshape(-1, x.shape[-1])
            if self.need and len(x):
                dense = self._dense.get(name)
                dense = None if dense is None else dense.reshape(x.shape)
                held = self.stats.get(name)
                self.stats[name] = held.add(x, self.need, dense) if held else Stats.of(x, self.need, dense)
            if self._probe and len(x):
                kept = x[:: -(-len(x) // self._probe)].to(torch.float32, copy=True)  # a view would hold all of x
                self.probes[name] = torch.cat([self.probes[name], kept]) if name in self.probes else kept
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
