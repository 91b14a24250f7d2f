"""What a comparison says of its texts: the parts of a mixture, and what calibration and evaluation share."""

import json
from typing import Any

import pytest
import torch
from rich.console import Console
from support.command_line import run

import secateur
from secateur.cli.tables import comparison_tables, summary
from secateur.data import corpora, readers
from secateur.data.windows import Windows
from secateur.evaluation.comparison.compare import overlap_notes
from secateur.evaluation.report.write import markdown


@pytest.fixture
def options(tiny_llama, text_file, tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(lines[:100]))
    (tmp_path / "judge.jsonl").write_text("".join(lines[200:]))
    (tmp_path / "code").mkdir()
    for number in range(4):
        (tmp_path / "code" / f"{number}.py").write_text(f"number = {number}\n" * 90)
    return {
        "model": str(tiny_llama), "evaluation": "judge.jsonl", "samples": 8, "seq_len": 64, "windows": 20,
        "methods": ["wanda"], "patterns": ["2:4"], "command": ["secateur", "compare"],
    }  # fmt: skip


def test_a_mixture_is_shown_part_by_part(options, tmp_path):
    mixture = "one.jsonl:3,code/*.py:1"
    results = secateur.compare(**options, calibration=[mixture, "one.jsonl"], out=tmp_path / "out")
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = held["calibrations"]
    assert [(part["source"], part["samples"], part["tokens"]) for part in first["parts"]] == [
        ("one.jsonl", 6, 384), ("code/*.py", 2, 128),
    ]  # fmt: skip
    assert "parts" not in second
    words = "one.jsonl 75.0%: 6 windows, 384 tokens; code/"
    assert words in markdown(results)
    assert words in (tmp_path / "out" / "report.html").read_text()
    console = Console(width=160, record=True)
    console.print(comparison_tables(results, 160))
    assert "(a mixture of one.jsonl, *.py)" in console.export_text()
    again = secateur.compare(**options, calibration=[mixture, "one.jsonl"], out=tmp_path / "out")
    assert again.rows == results.rows  # found again by their calibration text


def test_a_run_says_what_it_was_calibrated_on(options, tmp_path):
    report = secateur.prune(
        options["model"], out=tmp_path / "out", calibration="one.jsonl:1,code/*.py:1", samples=8, seq_len=64
    )
    words = "(one.jsonl 50.0%: 4 windows, 256 tokens; code/*.py 50.0%: 4 windows, 256 tokens)"
    assert any(words in line for line in summary(report) if line.startswith("Calibrated on 8 windows"))


def test_text_that_is_judged_on_and_was_calibrated_on_is_said(options, tmp_path):
    out = tmp_path / "out"
    shown = run(
        "compare", options["model"], "--calibration", "judge.jsonl", "--evaluation", "judge.jsonl", "--samples", 8,
        "--seq-len", 64, "--methods", "wanda", "--patterns", "2:4", "--out", out, "--quiet",
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    (note,) = results["notes"]
    words = " evaluation windows share 32 tokens in a row or more with the calibration text judge.jsonl: a model is"
    assert words in note
    assert 8 <= int(note.split(" of ")[0]) <= 16  # 8 windows lie in as many others, or across two each
    assert note.split()[2] == str(results["evaluation"]["samples"])
    assert words.strip() in " ".join(shown.split())
    assert words in (out / "report.md").read_text()
    assert "notes" not in results["evaluation"]


def test_how_much_text_was_drawn_from_is_shown(options, tmp_path, monkeypatch):
    for module in (readers, corpora):
        monkeypatch.setattr(module, "LARGE", 2**12)
    results = secateur.compare(**options | {"samples": 2, "seq_len": 32}, calibration="one.jsonl", out=tmp_path / "out")
    assert results.calibrations[0]["drawn"] == "at random bytes"
    assert "2 samples of 32 tokens, seed 0, drawn at random bytes, " in markdown(results)


def test_text_that_is_apart_needs_no_word(options, tmp_path):
    assert secateur.compare(**options, calibration="one.jsonl", out=tmp_path / "out").notes == []


def test_the_draw_that_shares_most_is_told_of():
    judged = Windows(torch.arange(640).view(10, 64), "judge", "test", None, 640)
    one = Windows(torch.arange(100, 228).view(2, 64), "one", "train", 0, None)
    other = Windows(torch.arange(100, 420).view(5, 64), "one", "train", 1, None)
    apart = Windows(torch.arange(5000, 5128).view(2, 64), "apart", "train", 0, None)
    (note,) = overlap_notes(judged, [one, other, apart])
    assert note.startswith("5 of 10 evaluation windows share 32 tokens in a row or more with the calibration text one:")
