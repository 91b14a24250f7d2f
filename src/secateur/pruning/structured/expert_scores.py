"""Which experts go: scores of the experts of a mixture, from what is routed to them.

`reap`        mean over the tokens routed to an expert of gate · ‖expert output‖ (REAP, Lasby et al.
              2025, arXiv:2510.13999, eq. 9)
`frequency`   how many tokens are routed to an expert
`random`      any
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models import experts
from secateur.models.replay import Call, run_block


@dataclass
class Routed:
    """What was routed to each expert: tokens, and the sum of gate · ‖output‖ over them, both
    float64 `[experts]`.
    """

    tokens: Tensor
    contribution: Tensor


def reap(routed: Routed) -> Tensor:
    """The mean contribution over routed tokens; an expert without any comes first."""
    return routed.contribution / routed.tokens.clamp_min(1)


def frequency(routed: Routed) -> Tensor:
    return routed.tokens


def at_random(routed: Routed) -> Tensor:
    return torch.rand(len(routed.tokens), generator=torch.Generator().manual_seed(0))


EXPERTS: dict[str, Callable[[Routed], Tensor]] = {
    "reap": reap,
    "frequency": frequency,
    "random": at_random,
}


def highest_in_groups(score: Tensor, count: int, groups: int) -> Tensor:
    """The `count` experts with the highest scores `[experts]`, int64 ascending, as many of each
    group of neighbours.
    """
    inside = score.view(groups, -1)
    order = inside.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return (order + inside.shape[1] * torch.arange(groups)[:, None]).flatten().sort().values


@torch.no_grad()
def routed_to(block: nn.Module, batches: Iterable[tuple[Tensor, Call]]) -> dict[str, Routed]:
    """What every fused experts module of a block sees while batches go through it, by its name."""
    found: dict[str, Routed] = {}
    with _watched(block, found):
        for hidden, call in batches:
            run_block(block, hidden, call)
    return found


@contextmanager
def _watched(block: nn.Module, found: dict[str, Routed]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen, gates, *_ = *args, *kwargs.values()
            _, second = experts.matrices(module)
            count = experts.count(module)
            routed = found.setdefault(
                name,
                Routed(
                    torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
                ),
            )
            chosen = chosen.reshape(-1, chosen.shape[-1])
            gates = gates.reshape(len(chosen), -1)
            for expert, x in experts.routed(module, hidden, chosen):
                inner = experts.inner(module, expert, x)
                weight = getattr(module, second)[expert]
                output = inner @ (weight if experts.is_transposed(module) else weight.T)
                if getattr(module, "has_bias", False):
                    output = output + getattr(module, f"{second}_bias")[expert]
                mine = chosen == expert
                whole = gates.shape != chosen.shape  # one gate for every expert, chosen or not
                gate = gates[mine.any(1), expert] if whole else (gates * mine).sum(1)[mine.any(1)]
                routed.tokens[expert] += len(output)
                routed.contribution[expert] += (
                    (gate.double().abs() * output.double().norm(dim=1)).sum().cpu()
                )

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in block.named_modules()
        if experts.is_experts(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
