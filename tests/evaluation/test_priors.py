"""What is known without measuring: each with source and date, about runtimes and hardware that exist."""

from __future__ import annotations

import re
import runpy

import pytest
from support.paths import ROOT
from support.recommending import MACHINE

from secateur.deployment.runtimes import RUNTIMES
from secateur.deployment.sparsity_support import OBJECTIONS, RULES, RUNTIME_FACTS
from secateur.evaluation.advice.goals import GOALS
from secateur.evaluation.advice.hardware import ACCELERATED, HARDWARE, is_measured
from secateur.evaluation.advice.priors import PRIORS, known_of, uses_zeros
from secateur.evaluation.results.schema import KINDS

TABLES = runpy.run_path(str(ROOT / "bench" / "tables.py"))


def test_every_prior_rule_and_hardware_has_a_source_and_a_date():
    for entry in [*PRIORS, *RULES.values(), *HARDWARE.values()]:
        assert entry.source.strip(), entry
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry.date), entry
    for prior in PRIORS:
        assert prior.kind in KINDS
        assert prior.goals
        assert set(prior.goals) <= GOALS.keys()
        assert set(prior.runtimes) <= {*RULES, *RUNTIMES}
        assert not prior.says.endswith(".")
        assert set(prior.makers) <= {held.maker for held in HARDWARE.values()}


def test_every_runtime_is_known_of_and_placed():
    for name in {*RULES, *RUNTIMES}:
        assert known_of(name, "latency") or any(name in prior.runtimes for prior in PRIORS), name
    alike = {name: facts.alike for name, facts in RUNTIME_FACTS.items() if facts.alike}
    assert alike.keys() <= RUNTIMES.keys()
    assert set(alike.values()) <= RULES.keys()
    assert RUNTIME_FACTS.keys() == {*RULES, *RUNTIMES}
    assert {name for name, rule in RULES.items() if not rule.never} == OBJECTIONS.keys()
    assert {name for name in RULES if RULES[name].build} == RULES.keys() - RUNTIMES.keys()
    assert set(ACCELERATED) <= RUNTIMES.keys()
    assert uses_zeros("packed", "50%")
    assert uses_zeros("packed", "2:4")
    assert uses_zeros("own-dense", "50%") is None
    assert not uses_zeros("semi-structured", "2:4")
    assert uses_zeros("semi-structured", "2:4", rows=2048)
    assert not uses_zeros("semi-structured", "4:8", rows=2048)
    assert not uses_zeros("eager", "2:4")


@pytest.mark.parametrize(
    ("hardware", "accelerators", "system", "runtime", "expected"),
    [
        (None, [], "Linux x86_64", "vllm", True),
        ("cpu", [], "Linux x86_64", "eager", True),
        ("cpu", ["NVIDIA H100 80GB HBM3"], "Linux x86_64", "eager-cuda", False),
        ("apple", [], "Linux x86_64", "eager", False),
        ("apple", [], "Darwin arm64", "eager", True),
        ("h100", ["NVIDIA H100 80GB HBM3"], "Linux x86_64", "vllm", True),
        ("h100", ["NVIDIA H100 80GB HBM3"], "Linux x86_64", "packed", False),
        ("h200", ["NVIDIA H100 80GB HBM3"], "Linux x86_64", "vllm", False),
        ("a10", ["NVIDIA A100-SXM4-80GB"], "Linux x86_64", "vllm", False),
        ("a100", ["NVIDIA A100-SXM4-80GB"], "Linux x86_64", "vllm", True),
        ("ampere", ["NVIDIA GeForce RTX 3090"], "Linux x86_64", "vllm", True),
        ("RTX-4090", ["NVIDIA GeForce RTX 4090"], "Linux x86_64", "semi-structured", True),
        ("mi300", ["AMD Instinct MI300X"], "Linux x86_64", "eager-cuda", True),
    ],
)
def test_timings_count_on_the_hardware_that_is_named(hardware, accelerators, system, runtime, expected):
    machine = {**MACHINE, "accelerators": accelerators, "system": system}
    assert is_measured(hardware, machine, runtime) is expected


def test_every_card_belongs_to_its_generation():
    for generation in ("volta", "turing", "ampere", "ada", "hopper", "blackwell"):
        words = {*HARDWARE[generation].words.split()}
        cards = [name for name, held in HARDWARE.items() if held.words and {*held.words.split()} < words]
        assert cards or len(words) == 1, generation
        assert all(HARDWARE[name].two_of_four == HARDWARE[generation].two_of_four for name in cards)
    assert {name for name, held in HARDWARE.items() if not held.two_of_four} == {
        "cpu", "apple", "volta", "v100", "turing", "t4", "rtx-2080",
    }  # fmt: skip


def test_the_pages_have_the_tables_of_what_is_known_as_they_are():
    for name in TABLES["PAGES"]:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert TABLES["renewed"](page) == page, f"{name} is old: python bench/tables.py"
    made = TABLES["tables"]()
    for name in HARDWARE:
        assert f"`{name}`" in made["hardware"]
    assert len(made["priors"].splitlines()) == 2 + len(PRIORS)
    assert all(prior.says in made["priors"] and prior.source in made["priors"] for prior in PRIORS)
    assert all(f"| {rule.uses} | {rule.source} | {rule.date} |" in made["rules"] for rule in RULES.values())
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in TABLES["PAGES"])
    assert all(text in pages for text in made.values())
