"""Plans: the arithmetic against brute force, each rule against a plain computation, and the file that holds one."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import tiny_model
from support.streams import TOKENS, seen_by_hooks, windows

import secateur
from secateur.errors import BadPattern, BadPlan, UnknownName
from secateur.methods import find_method
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import Unstructured
from secateur.models.load import replayable
from secateur.models.matrices import matrix_shapes
from secateur.models.stream.blocks import BlockRun
from secateur.pruning.in_memory import prune_model
from secateur.pruning.planning.allocation import (
    by_outliers,
    label,
    least_error,
    read_plan,
    scaled,
    sparsity_of,
    uniform,
    write_plan,
)
from secateur.pruning.planning.measured import ALLOCATIONS, make_plan
from secateur.pruning.planning.search import _Judge, _Library
from secateur.pruning.planning.sensitivity import Sensitivity, levels_around
from secateur.system.devices import find_resources
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Recipe


def planned(language_model, windows, allocate, **options):
    """`make_plan` with loose options, batches of 8 windows, or so many."""
    resources = find_resources(Compute(batch_size=options.pop("batch_size", 8)))
    return make_plan(language_model, windows, Recipe(allocate=allocate, **options), resources, Progress())


SHAPES = {"a.q": (4, 8), "a.down": (8, 16), "b.q": (4, 8), "b.down": (8, 16)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_least_error_is_never_worse_than_any_plan_on_the_grid(data):
    """Convex curves: the continuous optimum is at most the best of all choices of levels."""
    levels = [0.5, 0.6, 0.7, 0.8, 0.9]
    sizes = {name: data.draw(st.sampled_from([100, 200])) for name in "abc"}
    curves = {}
    for name in sizes:
        steps = sorted(data.draw(st.lists(st.floats(0.001, 1), min_size=4, max_size=4)))
        curves[name] = list(zip(levels, itertools.accumulate([0.01, *steps]), strict=True))
    found = least_error(curves, sizes, 0.7)
    total = sum(sizes.values())
    assert sum(found[n] * sizes[n] for n in sizes) / total == pytest.approx(0.7)

    def cost(plan):
        return sum(np.interp(plan[n], levels, [error for _, error in curves[n]]) for n in sizes)

    for choice in itertools.product(levels, repeat=3):
        plan = dict(zip("abc", choice, strict=True))
        if sum(plan[n] * sizes[n] for n in sizes) / total >= 0.7 - 1e-9:
            assert cost(found) <= cost(plan) + 1e-9


def test_least_error_follows_the_hull_of_a_curve_that_bends_the_wrong_way():
    curves = {"a": [(0.5, 0.0), (0.6, 0.9), (0.7, 1.0)], "b": [(0.5, 0.0), (0.6, 0.6), (0.7, 1.2)]}
    assert least_error(curves, {"a": 1, "b": 1}, 0.6) == pytest.approx({"a": 0.7, "b": 0.5})


def test_least_error_refuses_what_the_curves_do_not_reach():
    with pytest.raises(BadPlan, match=r"The error curves do not hold a mean sparsity of 80.0%."):
        least_error({"a": [(0.5, 0.0), (0.6, 1.0)]}, {"a": 10}, 0.8)


def test_outliers_are_spared_and_the_mean_holds():
    sizes = {"a": 100, "b": 300, "c": 100}
    found = by_outliers({"a": 0.01, "b": 0.03, "c": 0.05}, sizes, 0.7, 0.08)
    assert found["a"] > found["b"] > found["c"]
    assert found["a"] - found["c"] == pytest.approx(0.16)
    assert sum(found[n] * sizes[n] for n in sizes) / 500 == pytest.approx(0.7)


def test_a_block_that_would_lose_everything_is_refused():
    with pytest.raises(BadPlan, match=r"a would lose 103.0% of its weights for a mean of 95.0%; between 0 and 99%"):
        by_outliers({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}, 0.95, 0.08)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.filterwarnings("ignore")
def test_every_rule_removes_what_was_asked(rule, family):
    model = tiny_model(family)
    language_model = replayable(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = planned(language_model, windows(), rule, method="default", pattern="60%", batch_size=4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    shapes = matrix_shapes(language_model)
    assert plan.keys() == shapes.keys()
    assert sparsity_of(plan, shapes) == pytest.approx(0.6, abs=1e-5)
    report = prune_model(language_model, windows(), method="magnitude", pattern="60%", allocate=rule, batch_size=4)
    assert (report.allocation, report.pattern) == (rule, "60%")
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)  # each site rounds to whole weights


def test_owl_counts_outliers_of_whole_blocks():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[:, :3] *= 30
    plan = planned(replayable(model), windows(), "owl", method="wanda", pattern="70%", batch_size=4)
    shares = []
    for index in range(4):
        names = [name for name in matrix_shapes(replayable(model)) if f"layers.{index}." in name]
        inputs = seen_by_hooks(model, TOKENS, names)
        scores = [
            (model.get_parameter(f"{n}.weight").abs() * inputs[n].square().mean(0).sqrt()).flatten() for n in names
        ]
        whole = torch.cat(scores)
        shares.append((whole > 5 * whole.mean()).float().mean().item())
    expected = by_outliers({str(i): s for i, s in enumerate(shares)}, dict.fromkeys("0123", 1), 0.7, 0.08)
    for index in range(4):
        found = [pattern.sparsity for name, pattern in plan.items() if f"layers.{index}." in name]
        assert found == pytest.approx([expected[str(index)]] * 7, abs=2e-6)
    assert min(plan.values(), key=lambda pattern: pattern.sparsity) == plan["model.layers.2.self_attn.q_proj"]


def test_search_ends_nearer_to_the_dense_model_than_it_began():
    """Block 1 is made to matter little: its weights are near zero, so sparsity should move there."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.1.{name}.weight").mul_(0.02)
    language_model = replayable(model)
    plan = planned(language_model, windows(), "search", method="wanda", pattern="60%", batch_size=4)
    ratios = {i: plan[f"model.layers.{i}.mlp.up_proj"].sparsity for i in range(4)}
    assert ratios[1] == max(ratios.values()) > 0.6
    kl = {}
    for rule in ("uniform", "search"):
        pruned = tiny_model("llama")
        pruned.load_state_dict(model.state_dict())
        prune_model(replayable(pruned), windows(), method="wanda", pattern="60%", allocate=rule, batch_size=4)
        with torch.no_grad():
            p, q = (m(TOKENS).logits.log_softmax(-1) for m in (model, pruned))
        kl[rule] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl["search"] < kl["uniform"]


def test_the_judge_of_a_search_sees_what_a_plain_forward_sees(tmp_path):
    """The divergence with levels of two blocks, against the model with those weights written into it."""
    language_model = replayable(tiny_model("llama"))
    base = uniform(matrix_shapes(language_model), parse_pattern("60%"))
    cpu = torch.device("cpu")
    pattern = Unstructured(0.6)
    sensitivity = Sensitivity(BlockRun(language_model, TOKENS, [cpu], None, 3), find_method("wanda"), base, pattern)
    levels = levels_around(0.6)
    library = _Library(tmp_path, sensitivity, levels)
    judge = _Judge(sensitivity, library)
    assert judge.divergence({}) == 0
    chosen = {"model.layers.1": 0, "model.layers.3": 8}
    found = judge.divergence(chosen)
    assert found == judge.divergence(dict(chosen))
    judge.divergence({"model.layers.0": 4})
    assert judge.divergence(chosen) == found  # what was run in between leaves no trace
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    for name, level in chosen.items():
        library.put(pruned.get_submodule(name), name, level)
    zeros = (pruned.model.layers[1].mlp.up_proj.weight == 0).float().mean().item()
    assert zeros == pytest.approx(levels[0], abs=0.01)
    with torch.no_grad():
        p, q = (m(TOKENS[:8]).logits[:, :-1].log_softmax(-1) for m in (dense, pruned))
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = {"a.q": parse_pattern("61.8%"), "a.down": parse_pattern("2:4"), "b.down": parse_pattern("70% of row")}
    write_plan(tmp_path / "plan.json", plan, SHAPES, {"allocation": "by hand"})
    assert read_plan(tmp_path / "plan.json", SHAPES) == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    assert held["sites"] == {"a.q": "61.8%", "a.down": "2:4", "b.q": "dense", "b.down": "70% of row"}
    assert held["sparsity"] == pytest.approx((0.618 * 32 + 0.5 * 128 + 0.7 * 128) / 320)
    assert label(plan, SHAPES) == "60.2%"  # over the sites that are pruned
    assert label({"a.q": parse_pattern("2:4"), "b.q": parse_pattern("2:4")}, SHAPES) == "2:4"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{", BadPlan, "cannot be read as a plan"),
        ("[]", BadPlan, "is no plan: an object with schema 'secateur.plan/1' and 'sites' was wanted"),
        ('{"schema": "secateur.plan/1", "sites": {}}', BadPlan, "leaves every weight matrix dense"),
        ('{"schema": "secateur.plan/1", "sites": {"a.q": "dense"}}', BadPlan, "leaves every weight matrix dense"),
        ('{"schema": "secateur.plan/1", "sites": {"a.q": 0.5}}', BadPlan, "gives a.q 0.5; a pattern such as '70%'"),
        (
            '{"schema": "secateur.plan/1", "sites": {"a.p": "50%"}}',
            UnknownName,
            "There is no weight matrix in this model 'a.p'",
        ),
        ('{"schema": "secateur.plan/1", "sites": {"a.q": "half"}}', BadPattern, "'half' is no sparsity pattern"),
        ('{"schema": "secateur.plan/1", "sites": {"a.q": "5:16"}}', BadPattern, "5:16 needs inputs in groups of 16"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, error, words):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(error, match=words.replace("(", r"\(")):
        read_plan(tmp_path / "plan.json", SHAPES)


def test_only_percentages_can_be_shared_out():
    with pytest.raises(BadPlan, match=r"2:4 removes the same of every weight matrix"):
        scaled({"a.q": parse_pattern("2:4")}, {"a": 0.5})


def test_a_written_plan_prunes_as_the_rule_does(tiny_llama, text_file, tmp_path):
    options = {"calibration": str(text_file), "samples": 8, "seq_len": 32}
    file = tmp_path / "plan.json"
    secateur.plan(str(tiny_llama), out=file, allocate="error", method="wanda", pattern="60%", **options)
    weights = []
    for number, allocate in enumerate(["error", str(file)]):
        out = tmp_path / str(number)
        report = secateur.prune(str(tiny_llama), out=out, method="wanda", pattern="60%", allocate=allocate, **options)
        assert (report.pattern, report.allocation) == ("60%", allocate)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    held = json.loads(file.read_text())
    held["sites"] = {name: "2:4" if "down_proj" in name else "dense" for name in held["sites"]}
    file.write_text(json.dumps(held))
    report = secateur.prune(str(tiny_llama), out=tmp_path / "edited", method="wanda", allocate=str(file), **options)
    assert (report.pattern, report.kind) == ("2:4", "semi-structured")
    assert {site.site.rsplit(".", 1)[-1] for site in report.sites if site.pattern} == {"down_proj"}


@pytest.mark.parametrize("rule", ["error", "search"])
@pytest.mark.parametrize("pattern", ["90%", "33.33333333%", "4.66666667%", "95%"])
def test_any_sparsity_can_be_shared_out(rule, pattern):
    language_model = replayable(tiny_model("llama"))
    plan = planned(language_model, windows(), rule, method="wanda", pattern=pattern, batch_size=4)
    wanted = parse_pattern(pattern).sparsity
    assert sparsity_of(plan, matrix_shapes(language_model)) == pytest.approx(wanted, abs=1e-5)
    if pattern == "90%" and rule == "error":
        assert len({str(found) for found in plan.values()}) > 1
        assert max(found.sparsity for found in plan.values()) > 0.9


def test_more_than_can_be_measured_is_refused():
    with pytest.raises(BadPlan, match=r"Up to 95% can be shared out by measuring; found 96.0%"):
        planned(replayable(tiny_model("llama")), windows(), "search", method="wanda", pattern="96%")


@pytest.mark.parametrize("rule", ["uniform", *ALLOCATIONS])
def test_nothing_to_prune_is_refused(rule):
    with pytest.raises(BadPlan, match="Every weight matrix is left out; nothing would be pruned"):
        planned(replayable(tiny_model("llama")), windows(), rule, method="wanda", pattern="50%", skip=["*"])


@pytest.mark.filterwarnings("ignore")
def test_owl_leaves_blocks_without_tokens_at_the_mean():
    language_model = replayable(tiny_model("mixtral"))
    skip = ["self_attn.*", "*.experts.0.*", "*.experts.1.*"]
    plan = planned(language_model, windows(TOKENS[:1, :1]), "owl", method="wanda", pattern="60%", skip=skip)
    assert sparsity_of(plan, {name: matrix_shapes(language_model)[name] for name in plan}) == pytest.approx(
        0.6, abs=1e-5
    )


def test_a_plan_s_file_decides_instead_of_the_pattern(tmp_path):
    language_model = replayable(tiny_model("llama"))
    shapes = matrix_shapes(language_model)
    written = {name: parse_pattern("50%") for name in shapes if "layers.1." in name}
    write_plan(tmp_path / "plan.json", written, shapes, {})
    file = str(tmp_path / "plan.json")
    found = planned(language_model, windows(), file, method="wanda", pattern="3:7", skip=["q_proj"])
    assert found.keys() == {name for name in written if not name.endswith("q_proj")}
    with pytest.raises(BadPlan, match="Every weight matrix is left out"):
        planned(language_model, windows(), file, method="wanda", pattern="50%", skip=["*.1.*"])


def test_a_plan_of_few_matrices_says_what_stays_dense(tiny_llama, text_file, tmp_path):
    plan = {"schema": "secateur.plan/1", "sites": {"model.layers.0.mlp.up_proj": "50%"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given = {"method": "magnitude", "calibration": str(text_file), "samples": 4, "seq_len": 16}
    report = secateur.prune(tiny_llama, out=tmp_path / "out", allocate=str(tmp_path / "plan.json"), **given)
    assert "The plan leaves 27 of 28 weight matrices dense: model.layers.*.self_attn.q_proj (4), " in report.note
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "sites": {"*.up_proj": "50%"}}))
    with pytest.raises(
        BadPlan, match=r"names '\*\.up_proj'; a plan gives each weight matrix by its full name, without"
    ):
        secateur.prune(tiny_llama, out=tmp_path / "out2", allocate=str(tmp_path / "plan.json"), **given)
