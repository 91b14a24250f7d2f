"""The page, and the four mistakes that it must not allow: in a real browser where there is one, else as text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from support.recommending import MACHINE, timed

import secateur
from secateur.cli.tables import comparison_tables
from secateur.errors import BadResults
from secateur.evaluation.report import vega as draw
from secateur.evaluation.report.charts import charts, front
from secateur.evaluation.report.tables import sheets
from secateur.evaluation.report.write import markdown, page
from secateur.evaluation.results.ranking import rank
from secateur.evaluation.results.schema import SCHEMA, Results, Row

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img id=x>"
WINDOWS = 40


def text(samples: int, seed: int | None, source: str = "c4") -> dict[str, Any]:
    return {"source": source, "split": "train", "samples": samples, "length": 64, "seed": seed, "sha256": "0" * 64}


def everything() -> Results:
    """A comparison with all that a page can show: ties, speeds, tasks, draws, a search; names that are markup."""
    draw = np.random.default_rng(0)
    base = draw.normal(2.3, 0.3, WINDOWS)

    def row(method: str, pattern: str, kind: str, worse: float, noise: float = 0.01, **more: Any) -> Row:
        loss = base + worse + draw.normal(0, noise, WINDOWS)
        perplexity = float(np.exp(loss.mean()))
        delta = perplexity - float(np.exp(base.mean()))
        sites = [(f"model.layers.{i}.mlp.up_proj", 0.5 + more.get("uneven", 0) * i, 0.01 * (i + 1)) for i in range(4)]
        more.pop("uneven", None)
        held = {"parameters": 3_000_000, "checkpoint": f"checkpoints/{method}", "sites": sites, "calibration": 0} | more
        return Row(
            method, pattern, kind, 0.5, perplexity, delta, (delta - 0.1, delta + 0.1), 0.1, 0.8, {"solve": 1.5}, 2**29,
            held.pop("disk_bytes", 6 * 2**20), loss=loss.tolist(), **held,
        )  # fmt: skip

    def tasks(accuracy: float) -> dict[str, dict[str, Any]]:
        both = {"accuracy": accuracy, "stderr": 0.02, "delta": accuracy - 0.5, "delta_interval": [-0.1, 0.1]}
        return {"boolq": {**both, "items": 100, "accuracy_norm": None}, "mean": {**both, "tasks": 1}}

    rows = [
        row("dense", "-", "dense", 0.0, 0.0, calibration=None, checkpoint=None, sites=[], tasks=tasks(0.5),
            latency=[timed("eager", 1.0, tokens_per_second=40.0)]),
        row("magnitude", "50%", "unstructured", 0.2, calibration=None),
        row("wanda", "50%", "unstructured", 0.1, tasks=tasks(0.45)),
        row("sparsegpt", "50%", "unstructured", 0.1, latency=[timed("packed", 1.4, over=2.5, tokens_per_second=100.0)]),
        row(EVIL, "50%", "unstructured", 0.05),
        row("wanda", "20%", "unstructured", 0.01),
        row("wanda", "70%", "unstructured", 0.7),
        row("wanda", "2:4", "semi-structured", 0.4),
        row("sparsegpt", "2:4", "semi-structured", 0.3, uneven=0.05),
        row("energy", "25% of channels", "structured", 0.5, parameters=2_500_000, disk_bytes=5 * 2**20,
            tasks=tasks(0.4), latency=[timed("eager", 1.2, over=1.2, tokens_per_second=48.0)]),
        row("wanda", "50%", "unstructured", 0.15, calibration=1, checkpoint=None),
        row("wanda", "50%", "unstructured", 0.12, calibration=2, checkpoint=None),
        row("wanda", "33%", "unstructured", 0.05, searched=True, checkpoint=None),
    ]  # fmt: skip
    rank([row for row in rows if not row.searched])
    found = {"method": "wanda", "allocation": "uniform", "pattern": "20%", "perplexity": 10.1, "certain": True,
             "beyond": "21%", "most": 10.5, "note": ""}  # fmt: skip
    return Results(
        SCHEMA, {"name": f"some/{EVIL}", "parameters": 3_000_000, "shards": {}, "config": "0"},
        [text(128, 0), text(16, 0), text(16, 1)], text(WINDOWS, None, "wikitext2"), {"dtype": "torch.float32"},
        MACHINE, {"torch": "2.13.0"}, ["secateur", "compare", EVIL], rows, {"wanda 2:4: packed": "nothing to pack"},
        {"share": 0.05, "found": [found]},
    )  # fmt: skip


def plain() -> Results:
    """The same without speeds."""
    held = everything()
    return replace(held, rows=[replace(row, latency=[]) for row in held.rows])


def printed(results: Results, characters: int = 400) -> str:
    console = Console(width=characters, file=StringIO(), record=True)
    console.print(comparison_tables(results, characters))
    return console.export_text()


def shown_everywhere(results: Results) -> dict[str, str]:
    """What a person reads: on the terminal, wide and narrow, in Markdown and on the page."""
    return {
        "wide": printed(results), "narrow": printed(results, 80), "markdown": markdown(results), "page": page(results),
    }  # fmt: skip


def test_the_page_needs_nothing_from_outside_and_nothing_gets_in():
    held = page(everything())
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", held)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert addresses == set()
    assert EVIL not in held
    assert "<img" not in held
    assert "&lt;img id=x&gt;" in held
    assert len(held) < 400_000
    for chart in charts(everything()):
        ElementTree.fromstring(chart.svg)


def test_what_a_terminal_or_markdown_would_obey_is_shown_as_text():
    held = everything()
    held.rows[1].method = "w\x1b]0;owned\x07"
    held.command = ["secateur", "`\n\n<img src=x onerror=alert(1)>"]
    assert "\x1b" not in printed(held)
    assert "\x07" not in printed(held)
    text = markdown(held)
    assert "\x1b" not in text
    assert "\n<img" not in text
    assert "`" not in text.replace("\\`", "")


def test_every_picture_is_drawn_where_there_are_figures_for_it():
    assert [chart.title for chart in charts(everything())] == [
        "Perplexity against size", "Accuracy on tasks against size", "Perplexity against measured speed",
        "Perplexity against what it took", "Perplexity by how much is taken out", "Perplexity by calibration text",
        "Output error by block", "Sparsity by block, %",
    ]  # fmt: skip
    assert "Perplexity against measured speed" not in [chart.title for chart in charts(plain())]


def test_what_a_search_ended_at_is_in_no_picture_by_block():
    results = everything()
    patterns = [row.pattern for row in results.table]
    ended = {reach["pattern"] for reach in results.tolerance["found"]} & {p for p in patterns if patterns.count(p) == 1}
    (chart,) = [chart for chart in charts(results) if chart.title == "Output error by block"]
    assert ended
    assert not any(f">{pattern}<" in chart.svg for pattern in ended)


def test_a_page_without_room_to_draw_says_so(monkeypatch: pytest.MonkeyPatch):
    """As under `ulimit -v`, which kills the process that draws."""
    real = draw.subprocess.run

    def limited(command: list[str], **options: Any) -> Any:
        return real(["sh", "-c", 'ulimit -v 8000000; exec "$@"', "sh", *command], **options)

    monkeypatch.setattr(draw.subprocess, "run", limited)
    held = page(everything())
    assert "There are no pictures: the process that draws them has died (" in held
    assert "<svg" not in held
    assert "2-3 tie" in held


@pytest.mark.parametrize("least", [True, False])
def test_the_pareto_front_is_what_nothing_beats(least: bool):
    draw = np.random.default_rng(1)
    points = [(float(x), float(y)) for x, y in draw.integers(0, 12, (40, 2))]
    found = front(points, least=least)

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        x = a[0] <= b[0] if least else a[0] >= b[0]
        return x and a[1] <= b[1] and a != b

    wanted = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[i] for i in found} == wanted
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


# Mistake 1: kinds of sparsity as if they were equal.


def test_the_kind_stands_in_every_row_that_names_a_method_and_pattern():
    for sheet in sheets(everything()):
        if "pattern" in sheet.columns:
            assert sheet.columns[:3] == ("method", "pattern", "kind")
            assert all(
                line["kind"][0] in ("dense", "unstructured", "semi-structured", "structured") for line in sheet.lines
            )
    for where, shown in shown_everywhere(everything()).items():
        assert all(shown.count(kind) >= 1 for kind in ("unstructured", "semi-structured", "structured")), where


def test_a_rank_is_among_rows_of_one_pattern_alone():
    results = everything()
    for row in results.table:
        rivals = [other for other in results.table if other.pattern == row.pattern and other.kind != "dense"]
        assert all(tie in {other.name for other in rivals} for tie in row.ties)
        if row.rank:
            assert int(row.rank.split(" ")[0].split("-")[-1]) <= len(rivals)
    alone = [row for row in results.table if row.pattern == "25% of channels"]
    assert [row.rank for row in alone] == [""]


def test_a_tie_is_shown_as_one():
    results = everything()
    assert next(row for row in results.rows if row.method == "sparsegpt").ties == ["wanda 50%"]
    for where, shown in shown_everywhere(results).items():
        assert "2-3 tie" in shown, where


# Mistake 2: other base models or calibration texts; see also test_grid (`report`) and test_compare (rows on disk).


def test_no_table_holds_rows_of_two_draws():
    results = everything()
    assert {row.calibration for row in results.table} == {None, 0}
    lines = sheets(results)[0].lines
    assert len(lines) == len(results.table) == 10
    wandas = [row for row in results.rows if row.name == "wanda 50%"]
    assert [row.calibration for row in wandas] == [0, 1, 2]
    shown = [line["perplexity"][0] for line in lines if (line["method"][0], line["pattern"][0]) == ("wanda", "50%")]
    assert shown == [f"{wandas[0].perplexity:.2f}"]
    assert [row.rank for row in wandas] == ["2-3 tie", "", ""]


# Mistake 3: no calibration size.


def test_the_calibration_size_stands_at_every_table():
    for where, shown in shown_everywhere(everything()).items():
        assert "calibrated on 128 × 64 tokens" in " ".join(shown.split()), where
    for where in ("markdown", "page"):
        assert "16 samples of 64 tokens" in shown_everywhere(everything())[where]


@pytest.mark.parametrize("field", ["samples", "length", "source", "sha256"])
def test_a_comparison_without_its_calibration_size_is_refused(tmp_path: Path, field: str):
    held = json.loads(everything().json())
    del held["calibrations"][0][field]
    (tmp_path / "results.json").write_text(json.dumps(held))
    with pytest.raises(BadResults, match=rf"calibrations\.0: it lacks field '{field}'"):
        secateur.report([tmp_path], out=tmp_path / "out")
    held["calibrations"] = []
    held["rows"] = [row | {"calibration": None} for row in held["rows"]]
    (tmp_path / "results.json").write_text(json.dumps(held))
    with pytest.raises(BadResults, match=r"calibrations is \[\], which should have at least 1 item"):
        secateur.report([tmp_path], out=tmp_path / "out")


# Mistake 4: a speed-up that nobody measured.


def test_without_a_measurement_there_is_no_word_of_speed():
    for where, shown in shown_everywhere(plain()).items():
        words = " ".join(shown.split())
        assert "No speed was measured here, and zeros alone give none." in words, where
        assert not re.search(r"tokens/s|over eager|times as fast|first token", words), where


def test_a_row_that_was_not_timed_has_no_speed():
    first = sheets(everything())[0]
    shown = {(line["method"][0], line["pattern"][0]): line["tokens/s"][0] for line in first.lines}
    assert {key for key, speed in shown.items() if speed != "-"} == {
        ("dense", "-"), ("sparsegpt", "50%"), ("energy", "25% of channels"),
    }  # fmt: skip
    (chart,) = [chart for chart in charts(everything()) if "speed" in chart.title]
    assert "magnitude" not in chart.svg
    for where, shown in shown_everywhere(everything()).items():
        assert "packed" in shown, where  # a speed never stands without its runtime


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, in the theme and width that are asked for; nothing may be fetched, logged or thrown."""
    theme, width = getattr(request, "param", ("light", 1280))
    (tmp_path / "report.html").write_text(page(everything()), encoding="utf-8")
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900})
    found, wrong = context.new_page(), list[str]()
    found.on("console", lambda message: wrong.append(message.text))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
    found.goto(f"file://{tmp_path / 'report.html'}")
    yield found
    context.close()
    assert wrong == []


@pytest.mark.parametrize(
    "opened", [(theme, width) for theme in ("light", "dark") for width in (1280, 390)], indirect=True
)
def test_everybody_can_read_it(opened: Any):
    """axe finds nothing serious in light and dark, on a desk and a phone; only tables scroll sideways."""
    module = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = module.Axe().run(opened).response["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")
    ] == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.title().startswith("<img id=x>")
    assert opened.evaluate("document.images.length") == 0
    assert opened.locator("svg[role=img]").count() == 8


def column(opened: Any, name: str) -> list[str]:
    heads = opened.locator("table").first.locator("thead th").all_inner_texts()
    number = [head.split(" ")[0] if name == head.split(" ")[0] else head for head in heads].index(name) + 1
    return opened.locator("table").first.locator(f"tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("with_keys", [True, False])
def test_columns_sort_by_mouse_and_keyboard(opened: Any, with_keys: bool):
    before = column(opened, "perplexity")
    button = opened.locator("table").first.locator("thead button", has_text="perplexity")
    if with_keys:
        button.focus()
        opened.keyboard.press("Enter")
    else:
        button.click()
    head = opened.locator("table").first.locator("thead th", has=opened.locator("button", has_text="perplexity"))
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(value) for value in column(opened, "perplexity")]
    assert values == sorted(map(float, before))
    button.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column(opened, "perplexity")] == sorted(map(float, before), reverse=True)
    opened.locator("table").first.locator("thead button", has_text="tokens/s").click()
    assert head.get_attribute("aria-sort") == "none"
    speeds = column(opened, "tokens/s")
    assert speeds[3:] == ["-"] * 7  # what was not measured comes last, whichever way
    opened.locator("table").first.locator("thead button", has_text="tokens/s").click()
    assert column(opened, "tokens/s")[3:] == ["-"] * 7
    assert set(column(opened, "kind")) == {"dense", "unstructured", "semi-structured", "structured"}
