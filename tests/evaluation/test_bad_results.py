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
        ("rows.1.perplexity", "low", "rows.1.perplexity is 'low', which should be a valid number"),
        ("rows.1.calibration", 7, "row 1 names calibration 7, which is not there"),
        ("rows.1.calibration", -1, "row 1 names calibration -1, which is not there"),
        ("rows.0.kind", "unstructured", "its first row is not the dense model"),
        ("machine", {}, "machine: it lacks field 'processor'"),
        ("rows.1.perplexity", -1.0, "rows.1.perplexity is -1.0, which should be greater than 0"),
        ("rows.1.delta_interval", [2.0, 1.0], "rows.1.delta_interval: (2.0, 1.0) is no interval"),
        ("rows.1.kind", "odd", "rows.1.kind: it is 'odd', which should be 'dense'"),
        ("rows.1.disk_bytes", 0, "rows.1.disk_bytes is 0, which should be greater than 0"),
        ("rows.1.loss", [1e300], "rows.1.loss.0 is 1e+300, which should be less than 700"),
        ("rows.1.tasks", {"mean": {"accuracy": "high", "stderr": None, "delta": None, "delta_interval": None}},
         "rows.1.tasks.mean: accuracy is 'high', which should be a valid number"),
        ("rows.1.tasks", {"mean": {"accuracy": 0.5, "stderr": None, "tasks": 1}},
         "rows.1.tasks.mean: it lacks field 'delta'"),
        ("rows.1.rank", "first", "rows.1.rank is 'first', which should match"),
        ("rows.1.latency.0.tokens_per_second", 10**400, "rows.1.latency.0: tokens_per_second is 1000"),
        ("calibrations.0.samples", None, "calibrations.0: samples is None, which should be a valid integer"),
        ("rows.1.latency", [{"runtime": "eager"}], "rows.1.latency.0: it lacks field 'dtype'"),
        ("rows.1.latency.0.decode", [1.0, 2.0],
         "rows.1.latency.0: decode is [1.0, 2.0], which should have at least 3 items"),
        ("rows.1.latency.0.over_eager", None, "rows.1.latency.0: it has no over_eager"),
        ("rows.1.latency.0.weight_bytes", 0, "rows.1.latency.0: weight_bytes is 0, which should be greater than 0"),
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
