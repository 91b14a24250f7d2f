"""Experts merged into others: against loops, and where the answer is known."""

from itertools import chain, product

import pytest
import torch
from support.families import FUSED, tiny_model
from support.routing import caught_at
from support.streams import CPU, TOKENS
from torch import Tensor, nn

from secateur.models import experts
from secateur.models.channels.trace import entering
from secateur.models.load import replayable
from secateur.pruning.structured.expert_merging import aligned, apart, grouped, in_order, merged, neurons_of
from secateur.pruning.structured.expert_scores import routed_to


def first_experts(family: str) -> nn.Module:
    """The first fused experts of a tiny model."""
    model = replayable(tiny_model(family))
    return next(module for block in model.blocks for module in experts.fused_experts(block).values())


def tokens_for(module: nn.Module) -> Tensor:
    width = experts.inputs(module, experts.matrices(module)[0])
    return torch.randn(40, width, generator=torch.Generator().manual_seed(5))


def what_it_does(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    return experts.product(module, experts.matrices(module)[1], expert, experts.inner(module, expert, x))


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_neurons_in_another_order_do_the_same_and_find_back(family):
    """An expert that is another one in disguise: aligned it is that one, and so is the mean of both."""
    module = first_experts(family)
    neurons, x = neurons_of(module), tokens_for(module)
    order = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(1))
    for name in experts.parameters(module):
        getattr(module, name).data[2] = in_order(module, name, 1, order, neurons)
    assert torch.allclose(what_it_does(module, 1, x), what_it_does(module, 2, x), rtol=1e-4, atol=1e-6)
    assert torch.equal(order[aligned(module, 1, 2, x, neurons)], torch.arange(len(neurons)))
    score = torch.tensor([1.0, 0.5, 2.0, 1.0])
    for name, tensor in merged(module, module, [1, 2], score, x, neurons).items():
        assert torch.allclose(tensor, getattr(module, name)[1], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_the_mean_is_weighted_by_score():
    module = first_experts("mixtral")
    neurons, x = neurons_of(module), tokens_for(module)
    score = torch.tensor([1.0, 3.0, 0.0, 4.0])
    orders = {one: aligned(module, 3, one, x, neurons) for one in (0, 1)} | {3: torch.arange(len(neurons))}
    for name, tensor in merged(module, module, [3, 0, 1], score, x, neurons).items():
        parts = [share / 8 * in_order(module, name, e, orders[e], neurons) for e, share in ((3, 4), (0, 1), (1, 3))]
        wanted = torch.stack(parts).sum(0)
        assert torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_how_near_experts_are(family):
    """Against what every expert adds to every token, and every gate, one by one in float64."""
    language_model = replayable(tiny_model(family))
    block, hidden, call = entering(language_model, 1, TOKENS, CPU, torch.float32)
    ((name, routed),) = routed_to(block, [(hidden, call), (hidden, call)], merging=True).items()
    module, (x, chosen, gates) = block.get_submodule(name), caught_at(block, name, hidden, call)
    count = experts.count(module)
    of_all = torch.stack([(gates * (chosen == one)).sum(1) for one in range(count)]).double()
    added = [(of_all[one][:, None] * what_it_does(module, one, x).double()).mean(0) for one in range(count)]
    likeness, gap = torch.zeros(2, count, count, dtype=torch.float64)
    for i, j in product(range(count), repeat=2):
        likeness[i, j] = (torch.cosine_similarity(added[i], added[j], dim=0) + 1) / 2
        gap[i, j] = (of_all[i] / of_all[i].norm() - of_all[j] / of_all[j].norm()).norm()
    wanted = 1 - (likeness + 1 - gap / gap.max()) / 2
    assert torch.allclose(apart(routed), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(routed.shown, torch.cat([x, x])[:512])


@pytest.mark.parametrize(("total", "left", "sets"), [(40, 20, 1), (40, 2, 1), (32, 16, 4), (8, 6, 2)])
def test_groups_against_a_loop(total, left, sets):
    """Every centre in turn takes the nearest that is free; all experts are in one group."""
    draw = torch.Generator().manual_seed(total)
    distance, score = torch.rand(total, total, generator=draw), torch.rand(total, generator=draw)
    kept = torch.cat([torch.arange(left // sets) + total // sets * one for one in range(sets)])
    found = grouped(distance, score, kept, sets)
    most, owner = max(16, -(-total // left)), {one: one for one in kept.tolist()}
    for centre in sorted(owner, key=lambda one: score[one].item(), reverse=True):
        for _ in range(most - 1):
            same = [e for e in range(total) if e not in owner and e * sets // total == centre * sets // total]
            if same:
                owner[min(same, key=lambda e: distance[centre, e].item())] = centre
    assert [group[0] for group in found] == kept.tolist()
    assert [sorted(group) for group in found] == [sorted(e for e in owner if owner[e] == c) for c in kept.tolist()]
    assert sorted(chain(*found)) == list(range(total))
