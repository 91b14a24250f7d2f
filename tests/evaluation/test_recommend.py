"""Which row is recommended, and what is said of it: cases with a known answer, and the demo's real figures."""

from __future__ import annotations

import inspect as introspection
import json
import re
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from support.command_line import run
from support.recommending import DENSE, MACHINE, demo_results, row, table, timed
from typer.testing import CliRunner

import secateur
from secateur.cli import recommend as advice
from secateur.cli.app import app
from secateur.cli.recommend import lines
from secateur.errors import BadPattern, UnknownName
from secateur.evaluation.advice.goals import GOALS
from secateur.evaluation.advice.priors import LABEL
from secateur.evaluation.results.schema import Results

NO_ROW = None
DENSE_ROW = "dense -"
CLAIM = re.compile(r"fast|speed|quick|slow", re.IGNORECASE)

alps = row("alps", "50%", "unstructured", 0.5)
wanda = row("wanda", "50%", "unstructured", 0.9)
semi = row("alps", "2:4", "semi-structured", 1.4)
channels = row("obs", "25% of channels", "structured", 0.7, disk_bytes=750, parameters=375)
half = row("obs", "50% of channels", "structured", 1.9, disk_bytes=550, parameters=275)
int8 = row("alps", "50%", "unstructured", 0.5, values="int8", disk_bytes=400)
int4 = row("alps", "0%", "quantised", 0.1, values="int4", disk_bytes=300)
all_kinds = table(alps, wanda, semi, channels)
EAGER = [timed("eager", 1.0, 0.0)]


def accuracy(low: float, high: float) -> dict[str, dict[str, Any]]:
    """What a row has of tasks: 60 % on seven of them, 2 points below the dense model, and an interval."""
    return {"mean": {"tasks": 7, "accuracy": 0.6, "stderr": 0.01, "delta": -0.02, "delta_interval": [low, high]}}


def on(base, *entries):
    """A row with latency entries."""
    return replace(base, latency=list(entries))


def losses(shift: float, noise: float) -> list[float]:
    """Losses of 40 windows that move together with those of other shifts."""
    draw = Random(1)
    return [3 + draw.gauss(0, 0.5) + shift + noise * (number % 2 - 0.5) for number in range(40)]


H100 = {**MACHINE, "accelerators": ["NVIDIA H100 80GB HBM3"]}
CUDA = [timed("eager-cuda", 1.0, 0.0)]

CASES: dict[str, tuple[Results, dict[str, Any], str | None, str | None, list[str]]] = {
    # name: the comparison, what is asked, the answer, the runner-up, and what has to be said
    "quality: least perplexity": (
        all_kinds, {"goal": "quality"}, "alps 50%", "obs 25% of channels",
        ["It is unstructured, zeros anywhere", "Best structured row: obs 25% of channels", "not equal", "No limit"],
    ),
    "quality: the upper end is just within": (
        all_kinds, {"goal": "quality", "max_perplexity_increase": "3%"}, "alps 50%", None, ["does not bind"],
    ),
    "quality: the upper end is outside, the estimate within": (
        all_kinds, {"goal": "quality", "max_perplexity_increase": "2.6%"}, DENSE_ROW, None,
        ["alps 50% may be within 2.6% or not", "is 0.40% above that", "Without it the answer is alps 50%"],
    ),
    "quality: nothing within": (
        all_kinds, {"goal": "quality", "max_perplexity_increase": 0.01}, DENSE_ROW, None,
        ["Keep the dense model.", "No row is within 1%", "of the nearest, alps 50% (unstructured), is 2.00% above"],
    ),
    "quality: the first at each pattern": (
        table(
            replace(alps, rank="1-2 tie"), replace(wanda, rank="1-2 tie"),
            replace(alps, pattern="2:4", kind="semi-structured", rank="1", perplexity=DENSE + 2, delta=2.0,
                    delta_interval=(1.9, 2.1)),
        ),
        {"goal": "quality"}, "alps 50%", "wanda 50%",
        ["First at each pattern: 50% alps and wanda (a tie), 2:4 alps.", "favours what removes least"],
    ),
    "quality: a tie of the table": (
        table(replace(alps, rank="1-2 tie", ties=["wanda 50%"]), replace(wanda, rank="1-2 tie", ties=["alps 50%"])),
        {"goal": "quality"}, "alps 50%", "wanda 50%", ["a tie: the paired difference may be zero"],
    ),
    "quality: no tie of the table, though intervals overlap": (
        table(replace(alps, rank="1", delta_interval=(0.1, 1.0)), replace(wanda, rank="2", delta_interval=(0.4, 1.4))),
        {"goal": "quality"}, "alps 50%", "wanda 50%", ["behind: the paired difference is apart from zero"],
    ),
    "quality: a tie across kinds, by intervals": (
        table(alps, replace(channels, delta=0.55, perplexity=DENSE + 0.55, delta_interval=(0.45, 0.65))),
        {"goal": "quality"}, "alps 50%", "obs 25% of channels", ["a tie: their intervals overlap"],
    ),
    "quality: apart across kinds, by intervals": (
        table(alps, semi), {"goal": "quality"}, "alps 50%", "alps 2:4", ["behind: their intervals are apart"],
    ),
    "quality: apart across kinds, by windows": (
        table(
            replace(alps, loss=losses(0.0, 0.0), delta_interval=(0.0, 1.0)),
            replace(channels, loss=losses(0.01, 0.001), delta_interval=(0.2, 1.2)),
        ),
        {"goal": "quality"}, "alps 50%", "obs 25% of channels", ["behind: paired difference 95% interval"],
    ),
    "quality: a tie across kinds, by windows": (
        table(replace(alps, loss=losses(0.0, 0.0)), replace(channels, loss=losses(0.001, 0.2))),
        {"goal": "quality"}, "alps 50%", "obs 25% of channels", ["a tie: paired difference 95% interval"],
    ),
    "quality: less than dense": (
        table(row("alps", "10%", "unstructured", -0.3)), {"goal": "quality"}, "alps 10%", None,
        ["less than the dense"],
    ),
    "quality: no loss shown": (
        table(row("alps", "10%", "unstructured", 0.05)), {"goal": "quality"}, "alps 10%", None, ["no loss against"],
    ),
    "quality: rounded rows are not for a runtime that does not round": (
        table(int8, wanda), {"goal": "quality", "runtime": "vllm"}, "wanda 50%", None,
        ["vllm does not round weights, so these rows are not its: alps 50% int8", "vllm does not use them",
         "Without vllm the answer is alps 50% int8"],
    ),
    "quality: rows as stored are not for a runtime that rounds": (
        table(alps, wanda), {"goal": "quality", "runtime": "packed-int8"}, NO_ROW, None,
        ["packed-int8 rounds to int8, so"],
    ),
    "quality: steps of a search and other draws are no rows of the table": (
        table(replace(alps, searched=True), replace(alps, calibration=1), wanda, draws=2), {"goal": "quality"},
        "wanda 50%", None, ["Least perplexity of one row"],
    ),
    "quality: nothing pruned": (table(), {"goal": "quality"}, NO_ROW, None, ["No pruned row was measured."]),
    "quality: 2:4 on hardware that was not measured": (
        table(semi), {"goal": "quality", "hardware": "A100"}, "alps 2:4", None,
        ["a100 has compute capability 8.0, and"],
    ),
    "latency: the fastest of all runtimes": (
        table(
            on(alps, timed("packed", 1.6, over=2.5, against="own-dense"), timed("eager", 1.0)),
            on(channels, timed("eager", 1.3)), dense=[*EAGER, timed("own-dense", 1.0, 0.0, over=1.1)],
        ),
        {"goal": "latency"}, "alps 50%", "obs 25% of channels",
        ["In packed it decodes 1.60 [1.55, 1.65] times as fast as the dense model in own-dense", "the default",
         "behind, intervals apart", "AMD EPYC, 2 threads"],
    ),
    "latency: in the runtime that is asked for": (
        table(
            on(alps, timed("packed", 1.6, over=2.5, against="own-dense")), on(channels, timed("eager", 1.3)),
            dense=EAGER,
        ),
        {"goal": "latency", "runtime": "eager"}, "obs 25% of channels", DENSE_ROW,
        ["Without eager the answer is alps 50%", "alps 50% in eager: not timed.", "No other row"],
    ),
    "latency: an interval that contains 1": (
        table(on(alps, timed("eager", 1.02)), dense=EAGER), {"goal": "latency"}, DENSE_ROW, None,
        ["its interval contains 1, so it is not faster"],
    ),
    "latency: slower": (
        table(on(alps, timed("eager", 0.8)), dense=EAGER), {"goal": "latency"}, DENSE_ROW, None, ["it is slower"],
    ),
    "latency: the default limit keeps the fastest out": (
        table(on(channels, timed("eager", 1.3)), on(half, timed("eager", 1.8)), dense=EAGER),
        {"goal": "latency"}, "obs 25% of channels", DENSE_ROW,
        ["Limit: at most 5% more perplexity than the dense model, the default.", "Without it the answer is obs 50%"],
    ),
    "latency: a wider limit lets it in": (
        table(on(channels, timed("eager", 1.3)), on(half, timed("eager", 1.8)), dense=EAGER),
        {"goal": "latency", "max_perplexity_increase": "10%"}, "obs 50% of channels", "obs 25% of channels",
        ["Limit: at most 10% more perplexity than the dense model. It does not bind"],
    ),
    "latency: nothing within": (
        table(on(half, timed("eager", 1.8)), dense=EAGER), {"goal": "latency"}, DENSE_ROW, None,
        ["No row is within 5%", "Without it the answer is obs 50% of channels"],
    ),
    "latency: nothing timed": (
        all_kinds, {"goal": "latency"}, NO_ROW, None,
        ["No row that qualifies was timed.", "secateur compare some/model --bench eager,packed --out out/here", LABEL],
    ),
    "latency: not timed in that runtime": (
        table(on(channels, timed("eager", 1.3)), dense=EAGER), {"goal": "latency", "runtime": "llamacpp"}, NO_ROW, None,
        ["No row that qualifies was timed in llamacpp.", "--bench llamacpp --out", "llamacpp does not use them"],
    ),
    "latency: timed on other hardware": (
        table(on(channels, timed("eager", 1.3)), dense=EAGER), {"goal": "latency", "hardware": "h100"}, NO_ROW, None,
        ["was timed on h100", "The rows are from AMD EPYC", "--out out/here-h100", "compute capability 9.0"],
    ),
    "latency: timed on a processor": (
        table(on(channels, timed("eager", 1.3)), dense=EAGER), {"goal": "latency", "hardware": "cpu"},
        "obs 25% of channels", DENSE_ROW, [],
    ),
    "latency: timed on that card": (
        table(on(semi, timed("semi-structured", 1.4, against="eager-cuda")), dense=CUDA, machine=H100),
        {"goal": "latency", "hardware": "hopper", "max_perplexity_increase": "10%"}, "alps 2:4", DENSE_ROW,
        ["NVIDIA H100 80GB HBM3"],
    ),
    "latency: timed on another card": (
        table(on(semi, timed("semi-structured", 1.4, against="eager-cuda")), dense=CUDA, machine=H100),
        {"goal": "latency", "hardware": "ampere", "max_perplexity_increase": "10%"}, NO_ROW, None,
        ["AMD EPYC with NVIDIA H100 80GB HBM3"],
    ),
    "latency: no sparse tensor cores": (
        all_kinds, {"goal": "latency", "hardware": "t4"}, NO_ROW, None, ["no sparse tensor cores"],
    ),
    "latency: a runtime that is not driven": (
        all_kinds, {"goal": "latency", "runtime": "tensorrt-llm"}, NO_ROW, None,
        ["secateur validate CHECKPOINT --for tensorrt-llm", "trtllm-build --checkpoint_dir EXPORTED", "July 2026"],
    ),
    "latency: the dense model in another runtime beats it": (
        table(
            on(alps, timed("packed", 1.6, over=2.5, against="eager")),
            dense=[*EAGER, timed("llamacpp", 1.0, 0.1, over=4.0)],
        ),
        {"goal": "latency"}, DENSE_ROW, None, ["The dense model in llamacpp stands at 4.00 [3.90, 4.10]"],
    ),
    "latency: the dense model in another runtime is as fast": (
        table(
            on(alps, timed("packed", 1.6, 0.5, over=4.2, against="eager")),
            dense=[*EAGER, timed("llamacpp", 1.0, 0.1, over=4.0)],
        ),
        {"goal": "latency"}, DENSE_ROW, None, ["not faster with intervals apart"],
    ),
    "latency: a tie": (
        table(on(channels, timed("eager", 1.30)), on(alps, timed("packed", 1.33, against="eager")), dense=EAGER),
        {"goal": "latency"}, "alps 50%", "obs 25% of channels", ["a tie: the intervals overlap"],
    ),
    "latency: prefill is all there is": (
        table(
            on(channels, {k: v for k, v in timed("eager", 1.3, prefill_ratio=[1.4, 1.2, 1.6]).items()
                          if k not in ("decode", "decode_ratio", "over_eager")}),
        ),
        {"goal": "latency"}, "obs 25% of channels", DENSE_ROW, ["takes a prompt 1.40 [1.20, 1.60] times as fast"],
    ),
    "latency: zeros that the runtime is not known to use": (
        table(on(alps, timed("eager", 1.2)), dense=EAGER), {"goal": "latency"}, "alps 50%", DENSE_ROW,
        ["Doubt it: eager is not known to use such zeros"],
    ),
    "latency: a small gain by such zeros is taken for chance": (
        table(on(alps, timed("eager", 1.08)), on(channels, timed("eager", 1.07)), dense=EAGER), {"goal": "latency"},
        "obs 25% of channels", DENSE_ROW, ["alps 50% in eager, 1.08 [1.03, 1.13] times as fast: taken for chance"],
    ),
    "latency: nothing but chance": (
        table(on(alps, timed("eager", 1.08)), dense=EAGER), {"goal": "latency"}, DENSE_ROW, None,
        ["taken for chance", "Nearest: alps 50% (unstructured) in eager, 1.08 [1.03, 1.13]"],
    ),
    "latency: other conditions are left out, and said": (
        table(
            on(alps, timed("packed", 1.5, against="eager"), timed("packed", 9.0, against="eager", batch=64)),
            dense=EAGER,
        ),
        {"goal": "latency"}, "alps 50%", DENSE_ROW, ["Timings under other conditions: float32, batch 64, prompt 128."],
    ),
    "latency: why it was not timed": (
        table(
            on(channels, timed("eager", 1.3)), dense=EAGER,
            not_timed={"obs 25% of channels: obs-25 in packed": "nothing to pack."},
        ),
        {"goal": "latency", "runtime": "packed"}, NO_ROW, None, [],
    ),
    "memory: zeros in a plain checkpoint save nothing": (
        table(alps, wanda), {"goal": "memory"}, DENSE_ROW, None,
        ["No row that qualifies has fewer bytes on disk", "Zeros in a plain checkpoint save no bytes."],
    ),
    "memory: on disk": (
        all_kinds, {"goal": "memory"}, "obs 25% of channels", DENSE_ROW,
        ["750 bytes on disk, the dense model 1000 bytes"],
    ),
    "memory: the same size": (
        table(int8, replace(int8, method="wanda", delta=0.3, perplexity=DENSE + 0.3, disk_bytes=403)),
        {"goal": "memory"}, "wanda 50% int8", "alps 50% int8", ["the same size, so the lower perplexity decided"],
    ),
    "memory: rounding saves bytes too": (
        table(int8, channels), {"goal": "memory"}, "alps 50% int8", "obs 25% of channels",
        ["No row that is quantised and not pruned was measured at these bytes, ±3%.", "87.5% more"],
    ),
    "memory: quantise, do not prune": (
        table(int4, replace(int8, disk_bytes=305)), {"goal": "memory"}, "alps 0% int4", "alps 50% int8",
        ["Quantise, do not prune: alps 50% int8 (unstructured) is the best pruned row at equal bytes, +0.4 perp",
         "behind:"],
    ),
    "memory: prune and quantise": (
        table(replace(int4, delta=0.3, perplexity=DENSE + 0.3, disk_bytes=405), int8), {"goal": "memory"},
        "alps 50% int8", "alps 0% int4",
        ["alps 0% int4 (quantised) is the best row that is quantised and not pruned at equal bytes, -0.2 perplexity"],
    ),
    "memory: the limit keeps the smallest out": (
        table(channels, half), {"goal": "memory"}, "obs 25% of channels", DENSE_ROW,
        ["Without it the answer is obs 50% of channels (structured)"],
    ),
    "memory: in a runtime": (
        table(
            on(alps, timed("packed", 0.9, against="own-dense", weight_bytes=450)), channels,
            dense=[timed("own-dense", 1.0, 0.0)],
        ),
        {"goal": "memory", "runtime": "packed"}, "alps 50%", DENSE_ROW,
        ["450 bytes of weights read for a token in packed, the dense model 800 bytes in own-dense",
         "obs 25% of channels (structured) was not run in packed", "grow by 900 bytes"],
    ),
    "memory: not run in that runtime": (
        all_kinds, {"goal": "memory", "runtime": "packed"}, NO_ROW, None, ["was run in packed", "56 %"],
    ),
    "portability: structured": (
        all_kinds, {"goal": "portability"}, "obs 25% of channels", DENSE_ROW,
        ["every loader takes it", "375 of 500 parameters (75.0%)", "with zeros in it: 2 rows", "loads everywhere"],
    ),
    "portability: the smallest within the limit": (
        table(channels, half), {"goal": "portability", "max_perplexity_increase": "10%"}, "obs 50% of channels",
        "obs 25% of channels", ["Runner-up: obs 25% of channels (structured), 375 parameters"],
    ),
    "portability: no structured row": (
        table(alps, semi), {"goal": "portability"}, DENSE_ROW, None, ["No structured row qualifies."],
    ),
    "portability: the structured row loses too much": (
        table(alps, half), {"goal": "portability"}, DENSE_ROW, None, ["Without it the answer is obs 50% of channels"],
    ),
    "accuracy, where tasks were measured": (
        table(replace(alps, tasks=accuracy(-0.03, -0.01))),
        {"goal": "quality"}, "alps 50%", None, ["Mean accuracy on tasks 60.0%, -2.0% [-3.0%, -1.0%]."],
    ),
    "accuracy, a tie": (
        table(replace(alps, tasks=accuracy(-0.05, 0.01))),
        {"goal": "quality"}, "alps 50%", None, ["[-5.0%, +1.0%], not told apart from the dense model."],
    ),
}  # fmt: skip


def said(found: secateur.Recommendation) -> str:
    return "\n".join(lines(found))


@pytest.mark.parametrize("name", CASES)
def test_the_right_row_is_taken_and_the_reasons_are_said(name):
    results, asked, chosen, runner_up, phrases = CASES[name]
    found = secateur.recommend(results, **asked)
    assert (found.chosen, found.runner_up) == (chosen, runner_up), said(found)
    for phrase in phrases:
        assert phrase in said(found)
    head = {NO_ROW: "Nothing measured answers this.", DENSE_ROW: "Keep the dense model."}
    assert found.reasons[0] == head.get(chosen, f"Take {chosen}.")
    assert found.kind == next((row.kind for row in results.rows if row.name == chosen), None)
    assert (chosen is not NO_ROW) or (found.priors and found.measure)
    assert all(sentence.startswith(LABEL) for sentence in found.priors)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("hardware", [None, "cpu", "t4", "hopper", "mi300", "apple"])
def test_without_results_there_are_priors_alone_each_labelled(goal, hardware):
    found = secateur.recommend(None, goal=goal, hardware=hardware)
    assert found.chosen is None
    assert found.priors
    assert all(sentence.startswith(LABEL) for sentence in found.priors)
    assert found.measure[0].startswith("secateur compare MODEL --methods default")
    assert not any(CLAIM.search(sentence) for sentence in [*found.reasons, found.constraint, *found.not_considered])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("goal", GOALS)
def test_no_speed_is_claimed_of_what_was_not_timed(name, goal):
    results, asked, *_ = CASES[name]
    untimed = replace(results, rows=[replace(row, latency=[]) for row in results.rows])
    for held in (untimed, results):
        found = secateur.recommend(held, **{**asked, "goal": goal})
        for sentence in [*found.reasons, found.constraint, *found.not_considered]:
            if CLAIM.search(sentence):
                named = [row for row in held.rows[1:] if row.name in sentence]
                assert any(row.latency for row in held.rows), sentence
                assert all(row.latency for row in named), sentence
        assert all(sentence.startswith(LABEL) for sentence in found.priors)


def test_the_real_figures_of_the_demo_model():
    results = demo_results()
    best = secateur.recommend(results, goal="latency")
    assert best.chosen == "default 25% of channels"
    assert "In llamacpp it decodes 1.33 [1.20, 1.42]" in said(best)
    assert secateur.recommend(results, goal="latency", runtime="packed").chosen == DENSE_ROW
    assert secateur.recommend(results, goal="memory").chosen == "default 50% int8"
    assert secateur.recommend(results, goal="memory", runtime="packed-int8").chosen == DENSE_ROW
    assert secateur.recommend(results, goal="quality", max_perplexity_increase="2%").chosen == DENSE_ROW
    near = secateur.recommend(results, goal="quality")
    assert (near.chosen, near.runner_up) == ("default 25% of channels", "default 50%")
    assert "a tie" in said(near)
    assert secateur.recommend(results, goal="latency", runtime="vllm").measure == [
        "secateur compare --methods sparsegpt,default --patterns '50%,70%,2:4,25% of channels' "
        "--values 'as stored,int8' --bench-dtype float32 --windows 128 "
        "--bench eager,packed,packed-int8,llamacpp,vllm --out out/bench-demo"
    ]


def test_a_comparison_that_was_not_typed_is_put_into_a_command():
    results = replace(table(alps, replace(int8, allocation="owl")), command=["script.py", "; rm -rf /"])
    assert secateur.recommend(results, goal="latency", runtime="eager").measure == [
        "secateur compare some/model --methods alps --patterns 50% --allocate uniform,owl --values 'as stored,int8' "
        "--calibration c4 --samples 8 --seq-len 64 --seed 0 --evaluation c4 --windows 40 --bench eager --out OUT"
    ]


def test_the_answer_does_not_depend_on_the_order_of_rows():
    results = demo_results()
    for seed in range(5):
        shuffled = results.rows[1:]
        Random(seed).shuffle(shuffled)
        other = replace(results, rows=[results.dense, *shuffled])
        for goal in GOALS:
            for limit in (None, "5%", "10%", "50%"):
                asked = {"goal": goal, "max_perplexity_increase": limit}
                one, two = secateur.recommend(results, **asked), secateur.recommend(other, **asked)
                assert (one.chosen, one.runner_up) == (two.chosen, two.runner_up)


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_chosen_is_within_the_limit_and_of_the_runtime(goal):
    """Held against the definition, over limits, runtimes and hardware."""
    results = demo_results()
    by_name = {row.name: row for row in results.rows}
    for limit in (0.01, 0.028, 0.03, 0.0308, 0.1, 0.2, 0.5):
        for runtime in (None, "eager", "packed", "packed-int8", "llamacpp"):
            found = secateur.recommend(results, goal=goal, max_perplexity_increase=limit, runtime=runtime)
            if found.chosen in (None, DENSE_ROW):
                continue
            row = by_name[found.chosen]
            assert row.delta_interval[1] / results.dense.perplexity <= limit
            if runtime is not None:
                assert (row.values == "int8") == (runtime == "packed-int8")
            if goal == "latency":
                entries = [entry for entry in row.latency if runtime in (None, entry["runtime"])]
                assert max(entry["decode_ratio"][1] for entry in entries) > 1


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"goal": "qualty"}, UnknownName, "There is no goal 'qualty'. Did you mean 'quality'?"),
        ({"goal": "latency", "runtime": "vlm"}, UnknownName, "There is no runtime 'vlm'. Did you mean 'vllm'?"),
        ({"goal": "latency", "hardware": "rtx-3091"}, UnknownName, "Did you mean 'rtx-3090'?"),
        ({"goal": "memory", "max_perplexity_increase": "much"}, BadPattern, "'much'"),
        ({"goal": "memory", "max_perplexity_increase": -0.1}, BadPattern, "-0.1"),
    ],
)
def test_what_does_not_exist_is_refused(asked, error, words):
    with pytest.raises(error, match=re.escape(words)):
        secateur.recommend(None, **asked)


def test_the_command_prints_the_row_first_and_json_on_demand(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(demo_results().json())
    shown = run("recommend", str(file), "--goal", "portability")
    assert shown.splitlines()[0] == "Take default 25% of channels."
    assert LABEL in shown
    held = json.loads(run("recommend", str(tmp_path), "--goal", "memory", "--max-perplexity-increase", "50%", "--json"))
    assert held["chosen"] == "default 70% int8"
    assert held.keys() == {
        "goal",
        "chosen",
        "kind",
        "runner_up",
        "constraint",
        "reasons",
        "not_considered",
        "measure",
        "priors",
    }
    assert run("recommend", "--goal", "quality").splitlines()[0] == "Nothing measured answers this."
    refused = CliRunner().invoke(app, ["recommend", "--goal", "latency", "--hardware", "abacus"])
    assert isinstance(refused.exception, UnknownName)


def test_the_command_has_the_names_and_defaults_of_the_function():
    function = introspection.signature(secateur.recommend).parameters
    command = introspection.signature(advice.recommend).parameters
    assert command.keys() - {"as_json"} == function.keys()
    for option in function.keys() - {"goal"}:
        assert command[option].default == function[option].default, option
