"""Which blocks, units and experts go, against whole forwards of the model; and what takes over from removed blocks."""

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.families import tiny_model
from support.routing import caught_at
from torch import nn

from secateur.models.channels.groups import ChannelGroup, removable_groups
from secateur.models.channels.trace import entering, trace
from secateur.models.divergence import divergence
from secateur.models.hooks import recorded_inputs
from secateur.models.load import replayable
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import BlockRun, stream
from secateur.pruning.structured.block import _error_left
from secateur.pruning.structured.channel_scores import taylor
from secateur.pruning.structured.depth import angular, influence, kl, last_matrix, missing
from secateur.pruning.structured.expert_scores import EXPERTS, routed_to
from secateur.pruning.structured.feasibility import Feasibility
from secateur.pruning.structured.reconstruct import NEED, reconstructed

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 128, (6, 20), generator=torch.Generator().manual_seed(3))


def holds(family: str, removed: list[int]) -> bool:
    return Feasibility(replayable(tiny_model(family)), CPU).holds(removed)


def looking(language_model: LanguageModel, batch_size: int = 4) -> BlockRun:
    return BlockRun(language_model, TOKENS, [CPU], torch.float32, batch_size)


@torch.no_grad()
def states(language_model: LanguageModel) -> list[torch.Tensor]:
    """What enters each block, and what leaves the last one, of one whole forward."""
    seen: list[torch.Tensor] = []

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in language_model.blocks]
    last = language_model.blocks[-1].register_forward_hook(leaves)
    language_model.model(TOKENS, use_cache=False)
    for hook in (*hooks, last):
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next"])
def test_influence_takes_what_changes_the_hidden_state_least(family):
    language_model = replayable(tiny_model(family))
    seen = states(language_model)
    score = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(seen)]
    for count in (1, 2, 3):
        wanted = sorted(sorted(range(4), key=lambda i: score[i])[:count])
        assert influence(looking(language_model), count, lambda gone: True) == wanted


def test_angular_takes_a_span():
    language_model = replayable(tiny_model("llama"))
    seen = [h[:, -1] for h in states(language_model)]
    for count in (1, 2, 3):
        cosine = [torch.cosine_similarity(seen[i], seen[i + count], dim=-1).mean().item() for i in range(5 - count)]
        start = max(range(len(cosine)), key=lambda i: cosine[i])
        assert angular(looking(language_model), count, lambda gone: True) == list(range(start, start + count))


@torch.no_grad()
def without(language_model: LanguageModel, gone: list[int]) -> torch.Tensor:
    model = deepcopy(language_model.model)
    stack = model.get_submodule(language_model.stack)
    kept = nn.ModuleList([block for i, block in enumerate(stack.children()) if i not in gone])
    owner, _, leaf = language_model.stack.rpartition(".")
    setattr(model.get_submodule(owner), leaf, kept)
    model.config.num_hidden_layers = len(kept)
    return model(TOKENS, use_cache=False).logits.log_softmax(-1)


def test_kl_is_greedy():
    language_model = replayable(tiny_model("llama"))
    dense, gone = without(language_model, []), []
    for count in (1, 2):
        distance = {i: divergence(dense, without(language_model, [*gone, i])).mean() for i in range(4) if i not in gone}
        gone.append(min(distance, key=lambda i: distance[i]))
        assert kl(looking(language_model), count, lambda gone: True) == sorted(gone)


@pytest.mark.parametrize("select", [influence, angular, kl])
def test_only_what_a_configuration_holds_is_taken(select):
    language_model = replayable(tiny_model("llama"))
    assert select(looking(language_model), 1, lambda gone: gone == [2]) == [2]
    assert select(looking(language_model), 1, lambda gone: False) == []


def test_a_fixed_order_of_kinds_is_known():
    assert holds("llama", [1])
    assert holds("qwen3_next", [1])  # layer_types says each
    assert not holds("gemma4_text", [1])  # a table as wide as all blocks


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("llama", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("opt", "fc2"),
        ("gptj", "mlp.fc_out"),
        ("gemma2", None),
        ("mixtral", None),
    ],
)
def test_the_matrix_that_adds_to_the_output(family, site):
    block, hidden, call = entering(replayable(tiny_model(family)), 1, TOKENS, CPU, torch.float32)
    found = last_matrix(block, hidden, call)
    assert (found.name if found else None) == site


@torch.no_grad()
def test_a_fold_is_the_best_linear_stand_in_for_the_blocks_that_are_gone():
    language_model = replayable(tiny_model("llama"))
    step = next(stream(BlockRun(language_model, TOKENS, [CPU], torch.float32, 4)))
    stats = step.observe(NEED, 0, ["mlp.down_proj"]).stats["mlp.down_proj"]
    span = [(i, language_model.blocks[i]) for i in (1, 2)]
    added = missing(step.block, span, "mlp.down_proj", step.inputs.windows(), 0)
    weight = step.matrices["mlp.down_proj"].weight
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[::4] = False
    folded = reconstructed(weight, stats, kept, None, added.product).weight
    seen = states(language_model)
    inputs: list[torch.Tensor] = []
    with recorded_inputs(
        language_model.blocks[0], lambda name, x: inputs.append(x) if name == "mlp.down_proj" else None
    ):
        language_model.model(TOKENS, use_cache=False)
    x, delta = inputs[0].flatten(0, 1).double(), (seen[3] - seen[1]).flatten(0, 1).double()
    gram = x.T @ x / len(x)
    ridge = 0.1  # the largest: there are few tokens
    damped = gram + ridge * torch.diag(gram.diagonal())
    target = (weight.double() @ x.T @ x + delta.T @ x) / len(x) + ridge * weight.double() * gram.diagonal()
    wanted = torch.zeros_like(weight, dtype=torch.float64)
    wanted[:, kept] = target[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    assert (folded - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    left = ((seen[3] - seen[1]).flatten(0, 1) + x.float() @ (weight - folded).T).square().sum()
    change = torch.cat([weight - folded, torch.zeros(len(weight), 1)], 1)
    assert _error_left(change, weight, stats, added) == pytest.approx(
        (left / (x.float() @ weight.T).square().sum()).item(), 1e-3
    )
    after = seen[1].double() + x.view(*seen[1].shape[:2], -1) @ (wanted - weight.double()).T
    assert (after - seen[3]).norm() < (seen[1] - seen[3]).norm()


def test_taylor_of_the_last_matrix_is_its_energy():
    block, hidden, call = entering(replayable(tiny_model("llama")), 1, TOKENS, CPU, torch.float32)
    units = torch.arange(128)[:, None]
    seen: list[torch.Tensor] = []
    with torch.no_grad(), recorded_inputs(block, lambda name, x: seen.append(x) if name == "mlp.down_proj" else None):
        block(hidden, *call.args, **call.kwargs)
    energy = seen[0].flatten(0, 1).square().sum(0) * weight_matrices(block)["mlp.down_proj"].weight.square().sum(0)
    found = taylor(block, "mlp.down_proj", units, [(hidden, call)] * 60) / 60
    assert (found / energy - 1).abs().max() < 0.35  # random projections: 60 of 64 numbers on 120 tokens
    assert abs((found / energy).mean() - 1) < 0.02


def test_taylor_of_heads_is_the_derivative_of_the_block():
    """Against a finite step: the inputs of one head scaled down a little, in float64."""
    block, hidden, call = entering(replayable(tiny_model("llama")), 1, TOKENS[:2, :5], CPU, torch.float32)
    units = torch.arange(64).view(2, 32)
    found = taylor(block, "self_attn.o_proj", units, [(hidden, call)] * 400) / 400
    block.double()
    wanted = []
    for unit in units:
        outputs = []
        for size in (1.0, 1 - 1e-5):

            def scaled(module, args, unit=unit, size=size):
                x = args[0].clone()
                x[..., unit] *= size
                return (x,)

            hook = block.get_submodule("self_attn.o_proj").register_forward_pre_hook(scaled)
            kwargs = {k: tuple(t.double() for t in v) if isinstance(v, tuple) else v for k, v in call.kwargs.items()}
            with torch.no_grad():
                outputs.append(block(hidden.double(), *call.args, **kwargs))
            hook.remove()
        wanted.append(((outputs[0] - outputs[1]) / 1e-5).square().sum())
    assert (found / torch.stack(wanted) - 1).abs().max() < 0.15


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_reap_counts_what_is_routed(family):
    """Against the experts called one by one: the output of the module is the sum of gate x output."""
    language_model = replayable(tiny_model(family))
    block, hidden, call = entering(language_model, 1, TOKENS, CPU, torch.float32)
    ((name, routed),) = routed_to(block, [(hidden, call)]).items()
    module, (x, chosen, gates) = block.get_submodule(name), caught_at(block, name, hidden, call)
    for expert in range(4):
        mask = chosen == expert
        alone = module(x, chosen, gates * mask)  # gates of all others are zero
        assert routed.tokens[expert] == mask.any(1).sum()
        assert torch.isclose(routed.contribution[expert], alone.double().norm(dim=1).sum(), rtol=1e-4)
        shares = module(x, chosen, gates * mask / gates.sum(1, keepdim=True))
        assert torch.isclose(routed.renormalised[expert], shares.double().norm(dim=1).sum(), rtol=1e-4)
    assert torch.equal(EXPERTS["reap"](routed), routed.contribution / routed.tokens)
    assert torch.equal(EXPERTS["reap-renormalised"](routed), routed.renormalised / routed.tokens)
    assert torch.equal(EXPERTS["frequency"](routed), routed.tokens)


REMOVABLE = {
    "llama": {"self_attn.o_proj": "2 of 32", "mlp.down_proj": "128 of 1"},
    "bloom": {"self_attention.dense": "4 of 16", "mlp.dense_4h_to_h": "256 of 1"},
    "gpt2": {"attn.c_proj": "4 of 16", "mlp.c_proj": "128 of 1"},
    "falcon": {"self_attention.dense": "1 of 64", "mlp.dense_4h_to_h": "128 of 1"},
    "olmo2": {"self_attn.o_proj": "1 of 64", "mlp.down_proj": "128 of 1"},
    "bitnet": {"self_attn.o_proj": "1 of 64", "mlp.down_proj": "1 of 128"},
    "phi3": {"self_attn.o_proj": "2 of 32", "mlp.down_proj": "128 of 1"},
}


@pytest.mark.parametrize("family", REMOVABLE)
def test_units_that_can_go(family):
    found = removable_groups(trace(replayable(tiny_model(family)), 1, dtype=torch.float32))
    assert {name: f"{len(units)} of {len(units[0].inputs)}" for name, units in found.items()} == REMOVABLE[family]


def test_units_of_llama_that_can_go():
    found = removable_groups(trace(replayable(tiny_model("llama")), 1, dtype=torch.float32))
    assert found["mlp.down_proj"][5] == ChannelGroup((5,), (("mlp.gate_proj", 5), ("mlp.up_proj", 5)))
    second = found["self_attn.o_proj"][1]  # the second key-value head, and the two query heads that read it
    assert second.inputs == tuple(range(32, 64))
    assert dict.fromkeys(site for site, _ in second.outputs).keys() == {f"self_attn.{x}_proj" for x in "qkv"}
    rows = {x: [c for site, c in second.outputs if site == f"self_attn.{x}_proj"] for x in "qkv"}
    assert rows == {"q": list(range(32, 64)), "k": list(range(16, 32)), "v": list(range(16, 32))}
