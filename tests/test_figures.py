"""The figures of the pages against bench/results, where what was measured lies."""

import json
import re
import runpy
import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from support.paths import ROOT

from secateur.deployment.sparsity_support import RULES

RESULTS = ROOT / "bench" / "results"
ACCURACY = ["quality", "structured"]
"""Pages with tables of bench/seeds.py."""
INTERVAL = re.compile(r"([+-]?\d+(?:\.\d+)?) [\[(]([+-]?\d+(?:\.\d+)?)(?:, |-)([+-]?\d+(?:\.\d+)?)[\])]")
"""1.54 [1.43, 1.79] or 1.63 (1.61-1.64)."""
NOT_KEPT = {  # the runs are described there, their results are not in bench/results
    "docs/speed.md": {("0.79", "0.69", "1.03"), ("0.71", "0.63", "0.94")},  # the demo model on an H200
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def results() -> dict[str, Any]:
    """Every file of bench/results, by its name without `.json`."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}


def compared() -> Iterator[list[dict[str, Any]]]:
    """The rows of each comparison that bench/seeds.py made."""
    for found in results().values():
        if isinstance(found, dict) and found.get("command", [])[:1] == ["bench/seeds.py"]:
            yield found["rows"]


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of a comparison, up to the mean: pattern, method, what each seed adds to the perplexity."""
    keys = dict.fromkeys((r["pattern"], r["method"], r["allocation"]) for r in rows if r["kind"] != "dense")
    for key in keys:
        mine = [row for row in rows if (row["pattern"], row["method"], row["allocation"]) == key]
        pattern, method, allocation = key
        name = method if allocation == "uniform" else f"{method} by {allocation}"
        seeds = "; ".join("{:+.3g} [{:.3g}, {:.3g}]".format(r["delta"], *r["delta_interval"]) for r in mine)
        yield f"| {pattern} | {name} | {seeds} | {mean(mine):+.3g} |"


def mean(rows: list[dict[str, Any]]) -> float:
    return sum(row["delta"] for row in rows) / len(rows)


def added(method: str, pattern: str) -> set[str]:
    """What the pages may say that a method adds to the demo model's perplexity: in one comparison or another."""
    found = set()
    for rows in compared():
        demo = any(row["kind"] == "dense" and row["model"]["name"] == "demo" for row in rows)
        mine = [r for r in rows if (r["method"], r["pattern"], r["allocation"]) == (method, pattern, "uniform")]
        found |= {f"{mean(mine):.3g}"} if demo and mine else set()
    return found


def intervals(value: Any) -> Iterator[tuple[float, float, float]]:
    """Everything in results that is a figure with its interval, middle first."""
    if isinstance(value, dict):
        if value.get("delta_interval"):
            yield value["delta"], *value["delta_interval"]
        if value.get("kl_interval"):
            yield value["kl"], *value["kl_interval"]
        if "speedup_quartiles" in value:
            yield value["speedup"], *value["speedup_quartiles"]
        if {"median", "min", "max"} <= value.keys():
            yield value["median"], value["min"], value["max"]
        value = list(value.values())
    if isinstance(value, list):
        if len(value) == 3 and all(isinstance(part, int | float) for part in value):
            yield value[0], value[1], value[2]
            yield value[1], value[0], value[2]
        for part in value:
            yield from intervals(part)


def rounds_to(value: float, text: str) -> bool:
    """Whether a value is what the text says, to as many decimals or to three digits."""
    decimals = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.5000001 * 10**-decimals or float(text) == float(f"{value:.3g}")


@pytest.mark.parametrize("page", ACCURACY)
def test_tables_of_comparisons_are_those_of_the_results(page):
    measured = {line for rows in compared() for line in lines(rows)}
    said = re.findall(r"^(\| [^|\n]+ \| [^|\n]+ \| [+-][^|\n]+\] \| [+-][^|\n]+ \|)", read(f"docs/{page}.md"), re.M)
    assert len(said) > 40
    assert [line for line in said if line not in measured] == []


def test_no_row_of_a_comparison_is_left_out():
    pages = "".join(read(f"docs/{page}.md") for page in ACCURACY)
    assert [line for rows in compared() for line in lines(rows) if line not in pages] == []


def test_presets_add_what_was_measured():
    table = re.search(r"^\| method \| (50% .*?) \|\n\|[-|]+\|\n(.*?)\n\n", read("docs/methods.md"), re.S | re.M)
    assert table
    patterns = table[1].split(" | ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2].splitlines()]
    assert len(rows) == 4
    for name, *cells in rows:
        for pattern, cell in zip(patterns, cells, strict=True):
            assert f"{float(cell):g}" in {f"{float(v):g}" for v in added(name.strip("`"), pattern)}, (name, pattern)


def test_patterns_cost_what_was_measured():
    rows = re.findall(r"^\| `([^`]+)`[^|]*\|[^|]*\| ([\d.]+) \|", read("docs/choosing.md"), re.M)
    assert len(rows) == 10
    assert [(pattern, cell) for pattern, cell in rows if cell not in added("default", pattern)] == []


@pytest.mark.parametrize("page", sorted(file.name for file in (ROOT / "docs").glob("*.md") if file.name != "LOG.md"))
def test_figures_with_an_interval_were_measured(page):
    measured = [triple for found in results().values() for triple in intervals(found)]
    said = set(INTERVAL.findall(read(f"docs/{page}"))) - NOT_KEPT.get(f"docs/{page}", set())
    assert [s for s in said if not any(all(map(rounds_to, triple, s)) for triple in measured)] == []


def figures(text: str) -> set[float]:
    """The decimal numbers of a text, but for versions and arXiv ids."""
    return {float(found) for found in re.findall(r"(?<![\w.:])[+-]?(\d+\.\d+)(?![\d.]*\.\d)(?!\d)", text)}


def test_other_figures_of_choosing_stand_on_the_pages_that_it_links_to():
    """Pages against pages: this finds a figure that was changed in one place alone, not one that was never measured."""
    sources = "".join(read(f"docs/{name}.md") for name in ("quality", "structured", "speed", "demo-model"))
    assert figures(read("docs/choosing.md")) <= figures(sources) | figures("".join(map(str, RULES.values())))


def test_what_bos_is_worth_is_what_was_measured():
    """The table of the page of comparisons, line by line: bench/bos.py."""
    page = read("docs/comparing.md")
    for model in results()["bos"]["models"]:
        for row in model["rows"]:
            calibration = f"`{row['calibration']}`" if row["calibration"] else "–"
            judged = [f"{row['judged'][way]['perplexity']:.3f}" for way in ("stream", "each-window", "never")]
            assert f"| × {model['sink']:.0f} | {row['method']} | {calibration} | {' | '.join(judged)} |" in page


def test_what_quantisers_do_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    line = runpy.run_path(str(ROOT / "bench" / "quantisers.py"), run_name="quantisers")["line"]
    page = read("docs/quantising.md").split("## What quantisers do to zeros")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!quantiser|---).*\|$", page, re.M)
    assert rows == [line(row) for row in results()["quantisers"]["rows"]]


def test_what_tools_do_to_a_pruned_model_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    line = runpy.run_path(str(ROOT / "bench" / "quantise_peers.py"), run_name="peers")["zeros_line"]
    page = read("docs/quantising.md").split("## What their tools do to a pruned model")[1]
    rows = re.findall(r"^\| (?!quantiser|---).*\|$", page, re.M)
    (model,) = results()["quantised-zeros"]["models"].values()
    assert rows == [line(row) for row in model["rows"] if row["package"]]


def test_rows_at_equal_bytes_are_those_that_were_measured():
    """Every figure of the table in docs/quantising.md, from the rows of both models."""
    page = read("docs/quantising.md").split("### Prune or quantise?")[1].split("## What became")[0]
    before, costs = page.split("### What it costs")
    page = before + costs.split("\n### ")[1]
    models = [
        {(row["pattern"], short(row["values"])): row for row in results()[f"quantise-{name}"]["bytes"]}
        for name in ("smollm2", "demo")
    ]
    lines = [line.split(" | ") for line in re.findall(r"^\| (?!pattern|solver|quantiser|---)(.*) \|$", page, re.M)]
    table, solvers, peers = ([line for line in lines if len(line) == count] for count in (6, 3, 5))
    assert len(table) == len(models[0])
    for pattern, values, bits, stored_as, real, demo in table:
        first, second = models[0][pattern, values], models[1].get((pattern, values))
        assert bits == f"{first['bits']:.2f}"
        assert stored_as == first["stored_as"]
        assert real == f"{first['disk_bytes'] / 2**20:.1f} MiB, {judged(first)}"
        assert demo == (judged(second) if second else "-")
        assert second is None or abs(second["bits"] - first["bits"]) < 0.02
    drawn = [row for row in results()["quantise-demo"]["solvers"] if row["kind"] != "dense"]
    assert len(solvers) == 5
    for name, *figures in solvers:
        by = "" if name == "descent" else f" by {name}"
        for pattern, shown in zip(("0%", "50%"), figures, strict=True):
            rows = [row for row in drawn if (row["pattern"], row["values"]) == (pattern, f"int3 of group 64{by}")]
            assert len(rows) == 3
            found, kl = [row["perplexity"] for row in rows], statistics.mean(row["kl"] for row in rows)
            assert shown == f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f}), {kl:.4f}"
    tuned = {row["method"]: f"{row['perplexity']:.2f}" for row in results()["quantise-distil"]["distil"]}
    assert f"from\n  {tuned['default']} to {tuned['default+distil']} (" in page
    others = results()["quantise-peers"]["models"]
    assert peers
    for name, way, bits, *figures in peers:
        rows = [
            {(f"{row['package']} {row['version']}", row["way"]): row for row in others[model]["rows"]}.get((name, way))
            for model in ("smollm2", "demo-dense")
        ]
        assert figures == [judged(row) if row else "-" for row in rows]
        assert bits == f"{next(row for row in rows if row)['bits_per_weight']:.2f}"


def test_what_quantising_costs_is_what_was_measured():
    page = read("docs/quantising.md").split("### What it costs")[1].split("\n### ")[0]
    lines = [line.replace("`", "").split(" | ") for line in re.findall(r"^\| (?!\||---)(.*) \|$", page, re.M)]
    assert len(lines) == 5
    ours = [results()[f"quantise-{name}"] for name in ("29m", "smollm2")]
    for name, more in (("default", "default, 50 %"), ("default, int4", "and int4"), ("plain int4", "plain int4")):
        shown = [f"{one['cost'][name]:.1f}" for one in ours]
        if name == "default, int4":
            shown = [f"{seconds} ({one['ratio']:.2f} times)" for seconds, one in zip(shown, ours, strict=True)]
        assert [more, *shown] in lines
    for package in ("gptqmodel 7.7.0", "llmcompressor 0.14.0.1"):
        seconds = [
            row["whole_cpu_seconds"]
            for model in ("random-29m", "smollm2")
            for row in results()["quantise-peers"]["models"][model]["rows"]
            if (f"{row['package']} {row['version']}", row["way"]) == (package, "GPTQ, 4 bits")
        ]
        assert [f"{package}, 4 bits", *(f"{one:.1f}" for one in seconds)] in lines


def short(values: str) -> str:
    """Values as the table has them: groups of 64 are not said."""
    return values.removesuffix(" of group 64")


def judged(row: dict[str, Any]) -> str:
    """Perplexity and divergence of a row."""
    return f"{row['perplexity']:.2f}, {row['kl']:.4f}".replace(", 0.0000", ", 0")


def test_what_is_won_back_on_a_real_model_is_what_was_measured():
    page = read("docs/quality.md").split("## A real model")[1].split("\n## ")[0]
    shown = re.findall(r"^\| (?:50%|2:4) \| .*\|$", page, re.M)
    many, few, apart = (results()[f"real-quality{name}"]["rows"] for name in ("", "-32", "-128"))
    many = sorted(many, key=lambda row: row["pattern"], reverse=True)
    assert shown == [won_back(row) for row in (*many, *few, *apart)]


def test_what_training_takes_is_what_was_measured():
    page, found = read("docs/recovery.md"), results()["recover-speed"]
    assert f"takes {found['peak_bytes'] / 2**30:.2f} GiB and {found['share']:.2f} of the rate" in page


def test_what_dense_targets_do_to_a_real_model_is_what_was_measured():
    page, rows = read("docs/quality.md"), results()["real-dense-target"]["rows"]
    for row in (row for row in rows if row["values"] == "as stored"):
        figures = rf"`{re.escape(row['method'])}` {row['perplexity']:.2f} \((KL )?{row['kl']:.3f}\)"
        assert re.search(figures, page), figures


def won_back(row: dict[str, Any]) -> str:
    """A line of that table."""
    low, high = row["delta_interval"]
    return (
        f"| {row['pattern']} | {row['method']} | {row['perplexity']:.2f} | "
        f"+{row['delta']:.2f} [{low:.2f}, {high:.2f}] | "
        f"{row['kl']:.3f} | {row['removed']:.0%} | {row['removed_kl']:.0%} | {row['cost']:.1f} |"
    )
