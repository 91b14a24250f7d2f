"""Which experts go: scores of the experts of a mixture, from what is routed to them.

`reap`                mean over the tokens routed to an expert of gate · ‖expert output‖, with the
                      gate that the model applies (REAP, Lasby et al. 2025, arXiv:2510.13999, eq. 9)
`reap-renormalised`   with gates that sum to one over a token's experts, whatever the model does
`frequency`           how many tokens are routed to an expert
`random`              any

The authors' code renormalises since March 2026: where the configuration says that the model does,
which is `reap`, and in its pass by layers (April 2026) everywhere (CerebrasResearch/reap, 1970473).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models import experts
from secateur.models.hooks import watched
from secateur.models.replay import Call, run_block
from secateur.models.stream.observe import chosen_tokens


@dataclass
class Routed:
    """Tokens of each expert, and the sum of gate · ‖output‖ over them, float64 `[experts]`; once
    more with the gates of a token divided by their sum.
    """

    tokens: Tensor
    contribution: Tensor
    renormalised: Tensor


def reap(routed: Routed) -> Tensor:
    """The mean contribution over routed tokens; an expert without any comes first."""
    return routed.contribution / routed.tokens.clamp_min(1)


def reap_renormalised(routed: Routed) -> Tensor:
    return routed.renormalised / routed.tokens.clamp_min(1)


def frequency(routed: Routed) -> Tensor:
    return routed.tokens


def at_random(routed: Routed) -> Tensor:
    return torch.rand(len(routed.tokens), generator=torch.Generator().manual_seed(0))


EXPERTS: dict[str, Callable[[Routed], Tensor]] = {
    "reap": reap,
    "reap-renormalised": reap_renormalised,
    "frequency": frequency,
    "random": at_random,
}


def highest_in_groups(score: Tensor, count: int, groups: int) -> Tensor:
    """The `count` experts with the highest scores, as many of each group, int64 ascending."""
    inside = score.view(groups, -1)
    order = inside.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return (order + inside.shape[1] * torch.arange(groups)[:, None]).flatten().sort().values


@torch.no_grad()
def routed_to(
    block: nn.Module,
    batches: Iterable[tuple[Tensor, Call]],
    masks: Iterable[Tensor | None] = repeat(None),
) -> dict[str, Routed]:
    """What every fused experts module of a block sees while batches go through it, by its name.

    `masks`: by batch, the tokens that count, `[windows, length]` bool; None for all.
    """
    fused = experts.fused_experts(block)
    routed: dict[str, Routed] = {}

    def see(counted: Tensor | None, name: str, arguments: list[Any]) -> None:
        module, (hidden, chosen, gates) = fused[name], arguments[:3]
        nothing = torch.zeros(experts.count(module), dtype=torch.float64)
        seen = routed.setdefault(name, Routed(nothing, nothing.clone(), nothing.clone()))
        chosen = chosen.reshape(-1, chosen.shape[-1])
        gates = gates.reshape(len(chosen), -1)
        hidden, chosen, gates = (
            chosen_tokens(name, x.reshape(len(chosen), -1), counted)
            for x in (hidden, chosen, gates)
        )
        if not len(chosen):
            return
        if gates.shape != chosen.shape:  # one gate for every expert, chosen or not
            taken = (chosen >= 0) & (chosen < gates.shape[1])
            gates = gates.gather(1, chosen.where(taken, 0)) * taken
        whole = gates.double().abs().sum(1)
        for expert, tokens, x in experts.routed(module, hidden, chosen):
            _, second = experts.matrices(module)
            output = experts.product(module, second, expert, experts.inner(module, expert, x))
            mine = chosen == expert
            gate = (gates * mine).sum(1)[tokens]
            seen.tokens[expert] += len(output)
            norms = gate.double().abs() * output.double().norm(dim=1)
            seen.contribution[expert] += norms.sum().cpu()
            seen.renormalised[expert] += (norms / whole[tokens].clamp_min(1e-30)).sum().cpu()

    for (hidden, call), counted in zip(batches, masks, strict=False):
        with watched(fused, partial(see, counted)):
            run_block(block, hidden, call)
    return routed
