"""Tuning a finished block: against the closed form where there is one, and what it must leave alone."""

from math import nan

import pytest
import torch
from support.families import tiny_model
from support.streams import CPU, TOKENS, windows
from torch import nn

from secateur.errors import NonFinite
from secateur.models.load import replayable
from secateur.models.replay import Call
from secateur.models.stream import steps as stepping
from secateur.models.stream.blocks import BlockRun, stream
from secateur.models.stream.forward import Batch
from secateur.models.stream.refine import error, refine, shared_out, steps_on
from secateur.models.stream.steps import batch_of_a_step, held_back, judging_batches, step_windows
from secateur.pruning import in_memory
from secateur.pruning.in_memory import prune_model

MANY = torch.randint(3, 128, (80, 24), generator=torch.Generator().manual_seed(3))
"""Enough of it that what is tuned on some is better on others."""


class OneLayer(nn.Module):
    """A block of one linear layer without a residual, so that the best weights are known."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data.copy_(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden)


def problem():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=draw)
    x = torch.randn(6, 5, 40, 12, generator=draw) @ (torch.eye(12) + 0.4 * torch.randn(12, 12, generator=draw))
    kept = torch.rand(8, 12, generator=draw) > 0.5
    return weight, x, kept


def test_it_finds_the_weighted_least_squares_solution():
    weight, x, kept = problem()
    block = OneLayer(weight.where(kept, 0.0))
    batches = [Batch(part, Call((), {}), part @ weight.T) for part in x]
    with torch.no_grad():
        tuned = refine(block, {"layer.weight": kept}, batches, batches[:1], 2400, rate=0.1)
    assert tuned.better
    flat = x.reshape(-1, 12).double()
    scale = 1 / (flat @ weight.double().T).norm(dim=1, keepdim=True)  # each token relative to its target
    expected = torch.zeros(8, 12, dtype=torch.float64)
    for row in range(8):
        index = kept[row].nonzero()[:, 0]
        target = (flat @ weight[row].double())[:, None] * scale
        expected[row, index] = torch.linalg.lstsq((flat * scale)[:, index], target).solution[:, 0]
    assert torch.allclose(block.layer.weight.double(), expected, atol=2e-3)
    assert (block.layer.weight[~kept] == 0).all()
    assert tuned.after == pytest.approx(error(block, batches[:1]))


@pytest.mark.parametrize(
    ("windows", "length", "steps"),
    [(32, 512, 160), (128, 512, 160), (128, 2048, 160), (256, 256, 160), (16, 512, 80), (64, 16, 10)],
)
def test_a_step_sees_some_five_hundred_tokens_and_few_windows_come_five_times(windows, length, steps):
    assert steps_on(160, -(-windows // step_windows(length))) == steps


@pytest.mark.parametrize(
    ("count", "size", "batches"), [(32, 1, 2), (128, 1, 8), (120, 4, 2), (46, 3, 2), (130, 4, 3), (2, 1, 1), (6, 8, 0)]
)
def test_what_judges_is_not_touched(count, size, batches):
    sizes = [min(size, count - start) for start in range(0, count, size)]
    assert judging_batches(sizes) == batches
    first = count - held_back(count)
    assert not batches or (-(-count // size) - batches) * size <= first


@pytest.mark.parametrize(
    ("count", "length", "most", "size"),
    [(128, 512, 8, 1), (128, 128, 8, 4), (16, 32, 16, 15), (8, 64, 8, 7), (2, 16, 8, 1), (1, 16, 8, 1)],
)
def test_a_batch_leaves_windows_that_judge(count, length, most, size):
    """Few and short windows would be one batch, which would judge what was tuned on it."""
    assert batch_of_a_step(count, length, most) == size


def test_windows_judge_in_which_a_token_counts_that_is_foreseen():
    """As `+distil` has it: what stands first in a window is foreseen by nothing."""
    counted = torch.ones(16, 4, dtype=torch.bool)
    counted[-1, 1:] = False
    batches = [Batch(torch.ones(1, 4, 2), Call((), {}), torch.ones(1, 4, 2), one[None]) for one in counted]
    seen, judged = shared_out(batches)
    assert (len(seen), len(judged)) == (14, 2)  # one of 15 judges


@pytest.mark.parametrize("method", ["magnitude+refine", "magnitude+refine+distil"])
def test_windows_that_judge_change_nothing_in_a_block(monkeypatch, method):
    monkeypatch.setattr(in_memory, "distil_model", lambda *_: None)
    weights = {}
    for changed, text in ((None, MANY[0]), (-1, MANY[0]), (0, MANY[1])):
        tokens = MANY.clone()
        if changed is not None:
            tokens[changed] = text
        model = tiny_model("llama")
        prune_model(replayable(model), windows(tokens), method=method, pattern="50%")
        weights[changed] = model.model.layers[3].mlp.down_proj.weight
    assert torch.equal(weights[None], weights[-1])
    assert not torch.equal(weights[None], weights[0])


def test_a_batch_is_a_step(monkeypatch):
    """However many windows a forward pass may take, and however many there are, a block is tuned in as many steps."""
    weights = []
    monkeypatch.setattr(stepping, "STEP_TOKENS", 128)
    for most in (1, 8):
        model = tiny_model("llama")
        run = windows(torch.randint(0, 100, (6, 128), generator=torch.Generator().manual_seed(1)))
        report = prune_model(replayable(model), run, method="wanda+refine", pattern="2:4", batch_size=most)
        assert report.refined
        weights.append(model.model.layers[3].mlp.down_proj.weight)
    assert torch.equal(*weights)


def test_a_block_that_gets_no_better_keeps_its_weights():
    weight, x, kept = problem()
    block = OneLayer(weight)
    batches = [Batch(part, Call((), {}), part @ weight.T) for part in x]  # perfect already
    with torch.no_grad():
        tuned = refine(block, {"layer.weight": torch.ones_like(kept)}, batches, batches, 6, rate=1.0)
    assert not tuned.better
    assert torch.equal(block.layer.weight, weight)


@pytest.mark.parametrize("where", [0, -1])
def test_a_block_that_makes_no_numbers_is_refused(where):
    """Whether it does so where it is tuned or where it is judged."""
    weight, x, kept = problem()
    block = OneLayer(weight.where(kept, 0.0))
    x[where, 0, 0, 0] = nan
    batches = [Batch(part, Call((), {}), part @ weight.T) for part in x]
    with torch.no_grad():
        tuned = refine(block, {"layer.weight": kept}, batches[:-1], batches[-1:], 6)
    assert torch.equal(block.layer.weight, weight.where(kept, 0.0))
    with pytest.raises(NonFinite, match=r"model.layers.3 makes NaN or Inf of the text.*--dtype float32"):
        tuned.refuse_non_finite("model.layers.3")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma3_text"])
@pytest.mark.filterwarnings("ignore")
def test_refined_blocks_are_nearer_and_masks_stand_still(family, dtype):
    """Of every family: zeros stay, what is no site stays, the block's error falls, the model comes nearer."""
    found = {}
    for method in ("wanda", "wanda+refine"):
        model, dense = tiny_model(family), tiny_model(family)
        report = prune_model(replayable(model), windows(MANY), method=method, pattern="2:4", batch_size=3, dtype=dtype)
        assert all(site.sparsity == pytest.approx(0.5, abs=1e-3) for site in report.sites)
        pruned = {site.site.rsplit(".", 1)[0] for site in report.sites}
        assert pruned
        with torch.no_grad():
            p, q = (m(TOKENS, use_cache=False).logits.log_softmax(-1) for m in (dense, model))
        found[method] = (p.exp() * (p - q)).sum(-1).mean().item()
        if method == "wanda+refine":
            assert list(report.refined) == [f"{replayable(model).stack}.{i}" for i in range(4)]
            assert all(after < before for before, after in report.refined.values())
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "embed" in name or "wte" in name:
                    assert torch.equal(parameter, dense.get_parameter(name))
    assert found["wanda+refine"] < found["wanda"]


def test_the_first_mask_is_the_one_that_the_method_chose():
    """Block 0 has the same inputs either way, so its zeros must be the same ones."""
    masks = []
    for method in ("sparsegpt", "sparsegpt+refine"):
        model = tiny_model("llama")
        prune_model(replayable(model), windows(), method=method, pattern="50%")
        masks.append({name: p == 0 for name, p in model.model.layers[0].named_parameters()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_two_devices_refine_on_the_same_batches():
    weights = []
    for devices in ("cpu", "cpu,cpu"):
        model = tiny_model("llama")
        prune_model(replayable(model), windows(), method="wanda+refine", pattern="2:4", device=devices, batch_size=2)
        weights.append(model.model.layers[3].mlp.down_proj.weight)
    assert torch.allclose(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_skipped_sites_are_not_tuned():
    model, dense = tiny_model("llama"), tiny_model("llama")
    prune_model(replayable(model), windows(), method="wanda+refine", pattern="2:4", skip=["down_proj"])
    for index in range(4):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


@pytest.mark.filterwarnings("ignore")
def test_skipped_and_unseen_experts_are_not_tuned():
    """Experts share a parameter, so a mask of the whole parameter would let them drift."""
    model, dense = tiny_model("mixtral"), tiny_model("mixtral")
    report = prune_model(
        replayable(model), windows(TOKENS[:1, :3]), method="wanda+refine", pattern="2:4", skip=["*.experts.0.*"]
    )
    left = [site.site for site in report.sites if site.pattern is None]
    assert any(".experts.0." in name for name in left)
    assert any(".experts.0." not in name for name in left)  # three tokens do not reach every expert
    for name in left:
        layer, expert, matrix = name.rsplit(".", 2)
        before, after = (m.get_parameter(f"{layer}.{matrix}")[int(expert)] for m in (dense, model))
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "gemma4_text"])
@pytest.mark.filterwarnings("ignore")
def test_targets_are_what_the_dense_model_computes(family):
    """Gemma 3n and 4 leave keys and values in a block's call for later blocks: the two streams must not share them."""
    dense, expected = tiny_model(family), []
    for block in replayable(dense).blocks:
        block.register_forward_hook(lambda m, args, output: expected.append(output))
    with torch.no_grad():
        dense(TOKENS[:3], use_cache=False)
    run = stream(BlockRun(replayable(tiny_model(family)), TOKENS, [CPU], None, 3), dense=True)
    for index, step in enumerate(run):
        assert torch.allclose(step.batches()[0].target, expected[index], rtol=1e-4, atol=1e-5)
        for site in step.matrices.values():
            site.put(site.weight * 0.3)
