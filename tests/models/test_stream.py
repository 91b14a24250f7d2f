"""The stream: what enters each block, how statistics are gathered, several devices, and errors on the way."""

import json
import threading
import weakref
from pathlib import Path

import pytest
import torch
from support.families import tiny_model
from support.streams import CPU, TOKENS, seen_by_hooks, windows
from support.texts import byte_tokenizer

from secateur.checkpoints.record import LEFT_OUT, UNSEEN, UNSEEN_ROUNDED
from secateur.errors import NonFinite, UnsupportedModel
from secateur.methods import METHODS
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.statistics import Stats
from secateur.methods.values import find_codes, parse_values
from secateur.models.load import load, replayable
from secateur.models.matrices import matrix_shapes, weight_matrices
from secateur.models.stream import prefetch
from secateur.models.stream.blocks import BlockRun, stream
from secateur.pruning.in_memory import prune_model
from secateur.pruning.planning.allocation import uniform
from secateur.pruning.prepare import Pruning
from secateur.pruning.prune import prune, pruned_blocks
from secateur.system.devices import calibration_dtype, find_devices, forward_dtype


def steps(model, tokens=TOKENS, devices=(CPU,), batch_size=3):
    return stream(BlockRun(replayable(model), tokens, devices, None, batch_size))


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "falcon", "cohere2"]
)
def test_statistics_are_those_of_a_plain_forward(family):
    """Gemma alternates local and global attention: one mask for all blocks would show here."""
    model = tiny_model(family)
    for step in steps(model):
        stats = step.observe({"square", "gram"}, 0).stats
        expected = seen_by_hooks(model, TOKENS, [f"{step.name}.{site}" for site in step.matrices])
        for site, found in stats.items():
            if site.endswith("modality_router"):
                continue  # called twice in a forward
            x = expected[f"{step.name}.{site}"]
            assert found.tokens == len(x) >= TOKENS.numel()
            assert torch.allclose(found.mean("gram"), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            assert torch.allclose(found.mean("square"), x.square().mean(0), rtol=1e-5)


def test_sites_that_read_one_tensor_share_one_gram():
    step = next(iter(steps(tiny_model("llama"))))
    stats = step.observe({"gram"}, 0).stats
    assert stats["self_attn.q_proj"] is stats["self_attn.k_proj"] is stats["self_attn.v_proj"]
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert stats["mlp.gate_proj"] is not stats["self_attn.q_proj"]


def test_inputs_come_from_the_pruned_blocks_before():
    model = tiny_model("llama")
    for step in steps(model):
        stats = step.observe({"square"}, 0).stats
        name = f"{step.name}.mlp.down_proj"
        expected = seen_by_hooks(model, TOKENS, [name])[name]  # the model so far: earlier blocks changed
        assert torch.allclose(stats["mlp.down_proj"].mean("square"), expected.square().mean(0), rtol=1e-4)
        for site in step.matrices.values():
            site.put(site.weight * 0.5)
        for site in weight_matrices(model.get_submodule(step.name)).values():
            site.put(site.weight * 0.5)


def test_every_token_weighs_the_same_however_batches_are_cut():
    model = tiny_model("mixtral")
    for one, other in zip(steps(model, batch_size=7), steps(model, batch_size=2), strict=True):
        first = one.observe({"square"}, 0).stats
        second = other.observe({"square"}, 0).stats
        assert first.keys() == second.keys()
        for site in first:
            assert first[site].tokens == second[site].tokens
            assert torch.allclose(first[site].mean("square"), second[site].mean("square"), rtol=1e-4)


def test_each_expert_sees_only_its_own_tokens():
    step = next(iter(steps(tiny_model("mixtral"))))
    stats = step.observe({"square"}, 0).stats
    counts = [found.tokens for site, found in stats.items() if site.endswith("gate_up_proj")]
    assert sum(counts) == 2 * TOKENS.numel()  # two experts a token
    assert 0 < min(counts) < TOKENS.numel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", "one"),
        ("llama", "two"),
        ("mixtral", "one"),
        ("mixtral", "two"),
        ("gemma3_text", "one"),
        ("jamba", "one"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_two_devices_give_the_masks_of_one(family, passes, method):
    masks = []
    for devices in ([CPU], [CPU, CPU]):
        language_model = replayable(tiny_model(family))
        plan = uniform(matrix_shapes(language_model), parse_pattern("50%"))
        run = BlockRun(language_model, TOKENS, devices, None, 2)
        blocks = pruned_blocks(Pruning(run, METHODS[method], plan, passes))
        masks.append({name: tensor == 0 for block in blocks for name, tensor in block.tensors.items()})
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_an_error_inside_the_model_ends_the_run():
    """The reference code swallows it and prunes with statistics of zero."""
    language_model = replayable(tiny_model("llama"))

    def fail(*_):
        raise ValueError("inside the model")

    language_model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="inside the model"):
        prune_model(language_model, windows(), pattern="2:4")


def test_an_expert_without_tokens_is_reported_and_left_alone():
    model = tiny_model("mixtral")
    language_model = replayable(model)
    chosen = model.model.layers[1].mlp.experts

    def never_expert_0(module, args):
        hidden, index, weights = args
        return hidden, index.clamp_min(1), weights

    chosen.register_forward_pre_hook(never_expert_0)
    before = chosen.gate_up_proj[0].clone()
    report = prune_model(language_model, windows(), method="wanda", pattern="2:4")
    notes = {site.site: site.note for site in report.sites if site.note}
    assert notes == {
        "model.layers.1.mlp.experts.0.gate_up_proj": UNSEEN,
        "model.layers.1.mlp.experts.0.down_proj": UNSEEN,
    }
    assert torch.equal(chosen.gate_up_proj[0], before)


@pytest.mark.parametrize("pattern", ["0%", "50%"])
def test_an_expert_without_tokens_is_on_the_grid_where_values_are_wanted(pattern):
    """Formats have one kind of values for all experts."""
    model, values = tiny_model("mixtral"), parse_values("int4 of row")
    assert values
    given = {"method": "default", "pattern": pattern, "values": str(values), "dtype": "float32"}
    report = prune_model(replayable(model), windows(TOKENS[:1, :3]), **given)
    unseen = [site for site in report.sites if site.note == UNSEEN_ROUNDED]
    assert unseen
    for site in report.sites:
        if site.note == UNSEEN_ROUNDED:
            assert site.pattern == "0%"
            assert site.sparsity < 0.3  # what came to less than half a step
        if ".experts." in site.site:
            layer, expert, matrix = site.site.rsplit(".", 2)
            assert find_codes(model.get_parameter(f"{layer}.{matrix}")[int(expert)], values) is not None


def test_magnitude_prunes_experts_without_tokens_too():
    model = tiny_model("mixtral")
    report = prune_model(replayable(model), windows(TOKENS[:1, :2]), method="magnitude", pattern="2:4")
    assert all(site.sparsity == 0.5 for site in report.sites)


def test_skipped_sites_stay_dense_and_are_reported():
    model = tiny_model("llama")
    report = prune_model(replayable(model), windows(), method="wanda", pattern="2:4", skip=["down_proj", "*.0.*q_proj"])
    left = {site.site for site in report.sites if site.note == LEFT_OUT}
    assert left == {f"model.layers.{i}.mlp.down_proj" for i in range(4)} | {"model.layers.0.self_attn.q_proj"}
    assert (model.model.layers[0].self_attn.q_proj.weight != 0).all()


def test_infinite_activations_name_the_site():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = float("inf")
    with pytest.raises(NonFinite, match=r"activations that enter model\.layers\.1\.self_attn\.q_proj"):
        prune_model(replayable_although_broken(model), windows(), method="wanda", pattern="2:4")


def replayable_although_broken(model):
    """NaN differs from itself, so the replay check would refuse first: check the sound model, then break it."""
    weight = model.model.layers[1].input_layernorm.weight
    broken = weight.data.clone()
    weight.data.nan_to_num_(posinf=1.0)
    language_model = replayable(model)
    weight.data.copy_(broken)
    return language_model


def test_a_model_that_does_more_between_blocks_is_refused():
    model = tiny_model("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    kept = []
    first.register_forward_hook(lambda m, args, output: kept.append(output))
    second.register_forward_hook(lambda m, args, output: output + 0.1 * len(kept))
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM cannot be replayed .* differ by up to"):
        replayable(model)


def test_output_error_is_measured_on_real_inputs():
    model = tiny_model("llama")
    dense = tiny_model("llama")
    report = prune_model(replayable(model), windows(), method="wanda", pattern="2:4", batch_size=7)
    site = next(site for site in report.sites if site.site.endswith("layers.0.self_attn.q_proj"))
    x = seen_by_hooks(dense, TOKENS, [site.site])[site.site]
    old, new = (m.get_parameter(f"{site.site}.weight") for m in (dense, model))
    expected = (x @ (old - new).T).square().sum() / (x @ old.T).square().sum()
    assert site.output_error == pytest.approx(expected.item(), rel=1e-4)


def test_devices_are_found_by_name():
    assert find_devices("cpu,cpu") == [CPU, CPU]


def test_stats_add(tmp_path: Path):
    x = torch.randn(10, 4)
    whole, parts = Stats.of(x, {"gram"}), Stats.of(x[:3], {"gram"}) + Stats.of(x[3:], {"gram"})
    assert parts.tokens == 10
    assert torch.allclose(whole.sums["gram"], parts.sums["gram"])


def test_weights_stay_mapped_and_untouched(tiny_llama: Path):
    language_model = load(tiny_llama)
    before = {name: p.clone() for name, p in language_model.model.named_parameters()}
    plan = uniform(matrix_shapes(language_model), parse_pattern("2:4"))
    for _ in pruned_blocks(Pruning(BlockRun(language_model, TOKENS, [CPU], None, 2), METHODS["sparsegpt"], plan)):
        pass
    assert all(torch.equal(p, before[name]) for name, p in language_model.model.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_forward_dtype_does_not_touch_the_weights_that_are_kept(dtype):
    model, dense = tiny_model("llama"), tiny_model("llama")
    prune_model(replayable(model), windows(), method="magnitude", pattern="2:4", dtype=dtype)
    for pruned, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(pruned, before.where(pruned != 0, 0.0))


@pytest.mark.parametrize(
    ("name", "stored", "multiplies", "wanted"),
    [
        ("auto", torch.bfloat16, True, None),
        ("auto", torch.bfloat16, False, torch.float32),
        ("auto", torch.float32, True, torch.float32),
        ("auto", torch.float16, True, torch.float32),
        ("float32", torch.bfloat16, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
    ],
)
def test_calibration_is_in_bfloat16_where_that_is_stored_and_multiplied(name, stored, multiplies, wanted, monkeypatch):
    monkeypatch.setattr("secateur.system.devices.multiplies_bfloat16", lambda: multiplies)
    assert calibration_dtype(name, CPU, stored) == wanted
    assert forward_dtype("auto", CPU) == torch.float32  # what is evaluated never depends on the machine


def test_the_record_says_in_which_dtype_calibration_ran(tmp_path: Path, text_file, monkeypatch):
    monkeypatch.setattr("secateur.system.devices.multiplies_bfloat16", lambda: True)
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "method": "sparsegpt", "pattern": "2:4"}
    for dtype, wanted in (("auto", "bfloat16"), ("float32", "float32")):
        prune(tmp_path / "model", out=tmp_path / dtype, dtype=dtype, **options)
        assert json.loads((tmp_path / dtype / "pruning.json").read_text())["options"]["dtype"] == wanted


@pytest.mark.parametrize(("method", "passes"), [("wanda+sequential", "two"), ("wanda", "one")])
def test_each_site_gets_the_inputs_that_the_sites_before_it_leave(method, passes):
    """Checked from the outside: the reported error of the last site, against hooks on the partly pruned model."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    options = {"pattern": "2:4", "batch_size": len(TOKENS)}
    report = prune_model(replayable(model), windows(), method=method, passes=passes, **options)
    for block in (0, 3):
        name = f"model.layers.{block}.mlp.down_proj"
        x = seen_by_hooks(model, TOKENS, [name])[name]  # everything before this site is pruned by now
        old, new = dense.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")
        expected = (x @ (old - new).T).square().sum() / (x @ old.T).square().sum()
        found = next(site for site in report.sites if site.site == name)
        assert found.output_error == pytest.approx(expected.item(), rel=1e-3)
    mask = model.get_parameter("model.layers.3.mlp.down_proj.weight") != 0
    other = tiny_model("llama")
    prune_model(replayable(other), windows(), method="wanda", passes="two", **options)
    assert not torch.equal(mask, other.get_parameter("model.layers.3.mlp.down_proj.weight") != 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon"])
def test_groups_cover_every_site_once_in_order(family):
    step = next(iter(steps(tiny_model(family))))
    groups = step.groups()
    assert sorted(name for group in groups for name in group) == sorted(step.matrices)
    if family == "llama":
        ends = [[name.rsplit(".", 1)[-1] for name in group] for group in groups]
        assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    if family == "mixtral":
        assert [len(group) for group in groups] == [3, 1, 4, 4]


@pytest.mark.parametrize("devices", [[CPU], [CPU, CPU]])
def test_cross_products_pair_dense_inputs_with_those_of_the_pruned_model(devices):
    model, dense = tiny_model("llama"), tiny_model("llama")
    run = stream(BlockRun(replayable(tiny_model("llama")), TOKENS, devices, None, 3), dense=True)
    for step in run:
        stats = step.observe({"gram", "cross"}, 0).stats
        names = [f"{step.name}.{site}" for site in step.matrices]
        pruned, original = seen_by_hooks(model, TOKENS, names), seen_by_hooks(dense, TOKENS, names)
        for site, found in stats.items():
            name = f"{step.name}.{site}"
            expected = original[name].T @ pruned[name] / TOKENS.numel()
            assert torch.allclose(found.mean("cross"), expected, rtol=1e-3, atol=1e-5)
        for site in (*step.matrices.values(), *weight_matrices(model.get_submodule(step.name)).values()):
            site.put(site.weight * 0.7)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_dense_target_prunes_to_the_same_counts(family):
    model = tiny_model(family)
    report = prune_model(replayable(model), windows(), method="sweep+refit+dense-target", pattern="2:4")
    assert all(site.sparsity == 0.5 for site in report.sites)


@pytest.mark.parametrize("devices", [(CPU,), (CPU, CPU)])
def test_blocks_that_are_moved_ahead_change_nothing(devices, monkeypatch):
    """As on GPUs, with CPUs in their place; two blocks after the first come from the thread, whatever happens."""

    def run() -> dict[str, torch.Tensor]:
        language_model = replayable(tiny_model("llama"))
        plan = uniform(matrix_shapes(language_model), parse_pattern("2:4"))
        pruning = Pruning(BlockRun(language_model, TOKENS, devices, None, 2), METHODS["sparsegpt"], plan)
        return {n: t for b in pruned_blocks(pruning) for n, t in b.tensors.items()}

    expected, made = run(), []
    monkeypatch.setattr(prefetch, "wanted", lambda devices: True)
    real = prefetch.working_copy

    def copied(block, device, dtype):
        made.append(threading.current_thread() is threading.main_thread())
        if len(made) == 2:
            raise torch.OutOfMemoryError("no room for the next block")
        return real(block, device, dtype)

    monkeypatch.setattr(prefetch, "working_copy", copied)
    found = run()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(made) >= 3
    assert not any(made)


def test_a_block_is_let_go_before_the_next_is_copied():
    alive = []
    for step in steps(tiny_model("llama")):
        assert [held for held in alive if held() is not None] == []
        alive.append(weakref.ref(step.block))
        del step
