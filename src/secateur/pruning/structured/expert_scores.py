"""Which experts go: scores of the experts of a mixture, from what is routed to them.

`reap`                mean over the tokens routed to an expert of gate · ‖expert output‖, with the
                      gate that the model applies (REAP, Lasby et al. 2025, arXiv:2510.13999, eq. 9)
`reap-renormalised`   with gates that sum to one over a token's experts, whatever the model does
`ream`                as `reap`, and the experts that go are merged into others (expert_merging.py)
`frequency`           how many tokens are routed to an expert
`random`              any

The authors' code renormalises since March 2026: where the configuration says that the model does,
which is `reap`, and in its pass by layers (April 2026) everywhere (CerebrasResearch/reap, 1970473).
"""

from __future__ import annotations

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

SHOWN = 512
"""So many tokens are kept to compare neurons on."""


@dataclass
class Routed:
    """What experts were given and what they did, float64: of each, how many tokens it had, and over
    them the sums of gate · ‖output‖, of the same with the gates of a token divided by their sum,
    and of gate · output.

    `together` `[experts, experts]` has the products of gates, summed over tokens; `shown` the first
    tokens that entered, `[tokens, in]`.
    """

    tokens: Tensor
    contribution: Tensor
    renormalised: Tensor
    output: Tensor
    together: Tensor
    shown: Tensor

    @classmethod
    def nothing(cls, count: int, width: int) -> Routed:
        """Of so many experts that have had no token."""
        tokens, contribution, renormalised = torch.zeros(3, count, dtype=torch.float64)
        output = torch.zeros(count, width, dtype=torch.float64)
        together = torch.zeros(count, count, dtype=torch.float64)
        shown = torch.empty(0, width)
        return cls(tokens, contribution, renormalised, output, together, shown)


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
    "ream": reap,
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
    *,
    merging: bool = False,
) -> dict[str, Routed]:
    """What every fused experts module of a block sees while batches go through it, by its name.

    `masks`: by batch, the tokens that count, `[windows, length]` bool; None for all. With `merging`
    also what expert_merging.py asks of it: `output`, `together` and `shown`.
    """
    fused = experts.fused_experts(block)
    routed: dict[str, Routed] = {}

    def see(counted: Tensor | None, name: str, arguments: list[Any]) -> None:
        module, (hidden, chosen, gates) = fused[name], arguments[:3]
        count, width = experts.count(module), hidden.shape[-1]
        seen = routed.setdefault(name, Routed.nothing(count, width))
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
        of_all = torch.zeros(len(gates), count if merging else 0, dtype=torch.float64)
        if merging:
            seen.shown = torch.cat([seen.shown, hidden[: SHOWN - len(seen.shown)].float().cpu()])
        for expert, tokens, x in experts.routed(module, hidden, chosen):
            _, second = experts.matrices(module)
            output = experts.product(module, second, expert, experts.inner(module, expert, x))
            mine = chosen == expert
            gate = (gates * mine).sum(1)[tokens]
            seen.tokens[expert] += len(output)
            if merging:
                of_all[tokens.cpu(), expert] = gate.double().cpu()
                seen.output[expert] += (gate.double() @ output.double()).cpu()
            norms = gate.double().abs() * output.double().norm(dim=1)
            seen.contribution[expert] += norms.sum().cpu()
            seen.renormalised[expert] += (norms / whole[tokens].clamp_min(1e-30)).sum().cpu()
        if merging:
            seen.together += of_all.T @ of_all

    for (hidden, call), counted in zip(batches, masks, strict=False):
        with watched(fused, partial(see, counted)):
            run_block(block, hidden, call)
    return routed
