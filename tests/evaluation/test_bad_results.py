"""A results.json that somebody wrote or spoilt is refused in one sentence, or answered."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest
from support.recommending import demo_results
from support.spoilt_json import spoilt

import secateur
from secateur.cli.recommend import lines
from secateur.errors import BadResults, SecateurError, printable
from secateur.evaluation.advice.goals import GOALS
from secateur.evaluation.results.schema import read_results


def _set(held: Any, path: str, value: Any) -> None:
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        held = held[part]
    held[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema", "secateur.results/3", "its schema is 'secateur.results/3', secateur.results/5 was wanted"),
        ("schema", None, "its schema is None"),
        ("extra", 1, "it has an unknown field 'extra'"),
        ("rows", [], "it has no rows"),
        ("rows.1.perplexity", "low", "field 'perplexity' of row 1 is of another type"),
        ("rows.1.calibration", 7, "row 1 names calibration 7, which is not there"),
        ("rows.1.calibration", -1, "row 1 names calibration -1, which is not there"),
        ("rows.0.kind", "unstructured", "its first row is not the dense model"),
        ("machine", {}, "its machine has processor None"),
        ("rows.1.perplexity", -1.0, "has perplexity -1.0"),
        ("rows.1.delta_interval", [2.0, 1.0], "interval (2.0, 1.0)"),
        ("rows.1.kind", "odd", "has kind 'odd'"),
        ("rows.1.disk_bytes", 0, "has 0 bytes"),
        ("rows.1.loss", [1e300], "losses that no model has"),
        ("rows.1.tasks", {"mean": {"accuracy": "high", "stderr": None, "delta": None, "delta_interval": None}},
         "no accuracy on mean"),
        ("rows.1.tasks", {"mean": {"accuracy": 0.5, "tasks": 1}}, "has no delta on mean"),
        ("rows.1.rank", "first", "has rank 'first'"),
        ("rows.1.latency.0.tokens_per_second", 10**400, "has no tokens_per_second"),
        ("calibrations.0.samples", None, "one of its texts has samples None"),
        ("rows.1.latency", [{"runtime": "eager"}], "a timing of sparsegpt 50% has dtype None"),
        ("rows.1.latency.0.decode", [1.0, 2.0], "has decode [1.0, 2.0]; three positive numbers were wanted"),
        ("rows.1.latency.0.over_eager", None, "has over_eager None"),
        ("rows.1.latency.0.weight_bytes", 0, "that are no sizes"),
    ],
)  # fmt: skip
def test_bad_results_are_one_sentence(tmp_path, path, value, words):
    held = json.loads(demo_results().json())
    _set(held, path, value)
    (tmp_path / "results.json").write_text(json.dumps(held))
    with pytest.raises(BadResults, match=re.escape(words)) as raised:
        secateur.recommend(tmp_path, goal="quality")
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_a_missing_field_and_what_is_no_json_are_refused(tmp_path):
    held = json.loads(demo_results().json())
    del held["machine"]
    file = tmp_path / "results.json"
    for text, words in (
        (json.dumps(held), "it lacks field 'machine'"),
        ("[1", "is no comparison"),
        ("7", "schema is None"),
    ):
        file.write_text(text)
        with pytest.raises(BadResults, match=re.escape(words)):
            read_results(file)
    with pytest.raises(BadResults, match="cannot be read: No such file"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(BadResults, match="cannot be read: No such file"):
        secateur.recommend(tmp_path / "nothing", goal="quality")


def test_spoilt_results_are_refused_or_answered(tmp_path):
    """Whatever somebody wrote into the file, there is an answer or one sentence."""
    draw, data = Random(0), demo_results().json().encode()
    file = tmp_path / "results.json"
    answered = 0
    for _ in range(120):
        changed, what = spoilt(data, draw)
        file.write_bytes(changed)
        asked = {"goal": draw.choice(list(GOALS)), "runtime": draw.choice([None, "eager", "packed", "packed-int8"])}
        try:
            told = lines(secateur.recommend(file, **asked))
            answered += 1
        except SecateurError as error:
            told = [printable(str(error))]
        assert all(line.isprintable() for line in told), what
    assert answered > 5
