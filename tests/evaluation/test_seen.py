"""What a model was made with and is judged on is said by `evaluate`, from the record beside the model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run
from support.texts import WORDS

import secateur
from secateur.errors import BadCheckpoint

GIVEN: dict[str, Any] = {"samples": 8, "seq_len": 64}


@pytest.fixture
def texts(tmp_path) -> dict[str, str]:
    """Three texts that share no run of tokens."""
    places = {}
    for number, name in enumerate(("one", "other", "third")):
        draw = random.Random(number)
        lines = [" ".join(draw.choices(WORDS, k=40)) for _ in range(80)]
        places[name] = str(tmp_path / f"{name}.jsonl")
        Path(places[name]).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return places


def noted(folder: Path, text: str) -> str:
    return secateur.evaluate(folder, evaluation=text, seq_len=64).note


@pytest.mark.parametrize("pattern", ["2:4", "25% of channels"])
def test_text_that_was_calibrated_on_is_said(tiny_llama, texts, tmp_path, pattern):
    method = "wanda" if pattern == "2:4" else "energy"
    secateur.prune(tiny_llama, out=tmp_path / "out", method=method, pattern=pattern, calibration=texts["one"], **GIVEN)
    note = noted(tmp_path / "out", texts["one"])
    assert note.startswith("At least ")
    assert f" evaluation windows share 32 tokens in a row with {texts['one']}, on which the model was" in note
    assert note.endswith("on which the model was calibrated.")
    assert noted(tmp_path / "out", texts["other"]) == ""
    shown = run("evaluate", tmp_path / "out", "--evaluation", texts["one"], "--seq-len", 64, "--quiet")
    assert "on which the model was calibrated." in shown.replace("\n", " ")


def test_text_that_was_trained_on_is_said(tiny_llama, texts, tmp_path):
    secateur.prune(tiny_llama, out=tmp_path / "out", method="magnitude", calibration=texts["one"], **GIVEN)
    given: dict[str, Any] = {"way": "masked", "steps": 2, "batch_size": 4, "seq_len": 64}
    secateur.recover(tmp_path / "out", out=tmp_path / "tuned", text=texts["other"], **given)
    assert noted(tmp_path / "tuned", texts["other"]).endswith(f"{texts['other']}, on which the model was trained.")
    assert noted(tmp_path / "tuned", texts["one"]).endswith("on which the model was calibrated.")
    assert noted(tmp_path / "tuned", texts["third"]) == ""
    again = secateur.recover(tmp_path / "tuned", out=tmp_path / "again", text=texts["third"], **given)
    assert "marks" not in again.text
    record = json.loads((tmp_path / "again" / "pruning.json").read_text())
    assert all(len(entry["text"]["marks"]["hashes"]) < 1000 for entry in record["recovery"])


def test_records_without_marks_and_spoilt_ones(tiny_llama, texts, tmp_path):
    out = tmp_path / "out"
    secateur.prune(tiny_llama, out=out, method="magnitude", calibration=texts["one"], **GIVEN)
    record = json.loads((out / "pruning.json").read_text())
    marks = record["calibration"].pop("marks")
    assert marks["run"] == 32
    (out / "pruning.json").write_text(json.dumps(record))
    assert noted(out, texts["one"]) == ""
    record["calibration"]["marks"] = {**marks, "hashes": marks["hashes"][:-1]}
    (out / "pruning.json").write_text(json.dumps(record))
    with pytest.raises(BadCheckpoint, match=r"pruning\.json is no record of a pruning run: calibration\.marks\.hashes"):
        noted(out, texts["one"])
