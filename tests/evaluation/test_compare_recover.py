"""Recovered rows of a comparison: labelled, ranked among themselves, on text that is seen nowhere else, and kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.data.calibration import calibration_windows
from secateur.data.overlap import RUN
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import evaluation_windows
from secateur.errors import BadResults, ConditionsDiffer, NotEnoughText, UnknownName
from secateur.evaluation.comparison import recovered_rows as recovering
from secateur.evaluation.report.tables import comparison
from secateur.evaluation.report.write import markdown
from secateur.evaluation.results.schema import check, read_results
from secateur.methods.values import find_codes, parse_values
from secateur.models.load import load
from secateur.recovery import training
from secateur.recovery.masks import masks
from secateur.recovery.text import recovery_windows

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own


@pytest.fixture
def options(tiny_llama, text_file) -> dict[str, Any]:
    return {
        "model": str(tiny_llama), "calibration": str(text_file), "evaluation": str(text_file), "samples": 8,
        "seq_len": 96, "windows": 4, "methods": ["magnitude", "wanda"], "patterns": ["2:4"], "recover": ["masked"],
        "recover_steps": 3, "recover_text": str(text_file), "command": ["secateur", "compare"],
    }  # fmt: skip


def test_recovered_rows_say_so_and_are_ranked_among_themselves(options, tmp_path):
    results = secateur.compare(**options | {"recover": ["masked", "blocks"]}, out=tmp_path)
    assert [row.name for row in results.rows] == [
        "dense -",
        *(
            f"{method} 2:4{after}"
            for method in ("magnitude", "wanda")
            for after in ("", " recovered by masked in 3 steps", " recovered by blocks in 3 steps")
        ),
    ]
    plain, trained = ([row for row in results.rows[1:] if bool(row.recovered) is kind] for kind in (False, True))
    for rows in (plain, trained):
        ends = [row.rank.split(" ")[0].split("-") for row in rows]
        assert all(1 <= int(end[0]) <= int(end[-1]) <= len(rows) for end in ends)
        assert all(name in {row.name for row in rows} for row in rows for name in row.ties)
    for row in trained:
        assert row.recovered is not None
        assert row.recovered.tokens == 3 * 8 * 96
        assert row.seconds["recover"] == row.recovered.seconds > 0
        pruned = next(one for one in plain if one.method == row.method)
        one, two = (masks(load(tmp_path / str(held.checkpoint))) for held in (pruned, row))
        assert all((one[name] == two[name]).all() for name in one)
        assert row.sparsity == pruned.sparsity
        found = secateur.evaluate(
            str(tmp_path / str(row.checkpoint)), dense=options["model"], evaluation=options["evaluation"], seq_len=96,
            windows=4,
        )  # fmt: skip
        assert row.perplexity == pytest.approx(found.perplexity, rel=1e-9)
    told = [line["method"][0] for line in comparison(results).lines if "tokens" in line["method"][0]]
    assert told[0].startswith("magnitude, masked 2 k tokens ")
    assert len(told) == 4
    assert "fine-tuned after pruning" in markdown(results)
    check(read_results(tmp_path))
    best = min(results.rows[1:], key=lambda row: row.perplexity)
    assert secateur.recommend(tmp_path, goal="quality").chosen == best.name


def test_what_is_on_a_grid_is_recovered_on_it_or_not_at_all(options, tmp_path):
    grid = {"methods": ["magnitude"], "values": ["int4 of 32"], "recover": ["masked", "blocks"]}
    results = secateur.compare(**options | grid, out=tmp_path)
    pruned = "magnitude 2:4 int4 of group 32"
    assert [row.name for row in results.rows] == ["dense -", pruned, f"{pruned} recovered by blocks in 3 steps"]
    assert "masked trains weights off that grid" in results.not_timed[f"{pruned} recovered by masked in 3 steps"]
    values = parse_values("int4 of 32")
    assert values is not None
    tensors = load_file(tmp_path / str(results.rows[-1].checkpoint) / "model.safetensors")
    matrices = [weight for name, weight in tensors.items() if "proj" in name]
    assert matrices
    assert all(find_codes(weight, values) is not None for weight in matrices)


def test_no_text_is_shared(options, tmp_path):
    results = secateur.compare(**options | {"windows": 60, "recover_steps": 12}, out=tmp_path)
    trained = results.rows[2].recovered
    assert trained is not None
    tokenizer = load_tokenizer(tmp_path / str(results.rows[1].checkpoint))
    judged = evaluation_windows(tokenizer, options["evaluation"], length=96, windows=60, data_dir=None)
    drawn = recovery_windows(tokenizer, options["recover_text"], count=96, length=96, seed=0)
    assert drawn.fingerprint() != trained.text  # what would overlap was left out

    def runs(rows: list[list[int]]) -> set[tuple[int, ...]]:
        stream = [token for row in rows for token in row]
        return {tuple(stream[i : i + RUN]) for i in range(len(stream) - RUN + 1)}

    assert runs(judged.ids.tolist()) & runs(drawn.ids.tolist())
    calibrated = calibration_windows(tokenizer, options["calibration"], samples=8, length=96, seed=0, data_dir=None)
    kept = recovery_windows(
        tokenizer, options["recover_text"], count=96, length=96, seed=0, avoid=[judged.ids, calibrated.ids]
    )
    assert kept.fingerprint() == trained.text
    assert not runs(judged.ids.tolist()) & runs(kept.ids.tolist())


def test_what_is_finished_is_kept(options, tmp_path, monkeypatch):
    first = secateur.compare(**options, out=tmp_path)
    trained = []
    real = recovering.run_recovery
    monkeypatch.setattr(recovering, "run_recovery", lambda job: trained.append(job.training.way) or real(job))
    again = secateur.compare(**options, out=tmp_path)
    assert again.rows == first.rows
    row = tmp_path / "rows" / "wanda-2of4-recovered-by-masked-in-3-steps.json"
    row.unlink()  # as if it had died after the recovery had ended, before its row was kept
    again = secateur.compare(**options, out=tmp_path)
    assert again.rows == first.rows
    assert not trained
    row.unlink()
    record = tmp_path / "checkpoints" / row.stem / "pruning.json"
    record.write_text(record.read_text().replace('"way": "masked"', '"way": "lora"'))
    assert [row.loss for row in secateur.compare(**options, out=tmp_path).rows] == [row.loss for row in first.rows]
    assert trained == ["masked"]
    more = secateur.compare(**options | {"recover_steps": 2}, out=tmp_path)
    assert more.rows[2].name == "magnitude 2:4 recovered by masked in 2 steps"


def test_another_text_is_refused(options, tmp_path, text_file):
    secateur.compare(**options, out=tmp_path / "out")
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed(text_file.read_text().splitlines())))
    with pytest.raises(ConditionsDiffer, match="recovered by masked in 3 steps was recovered with text"):
        secateur.compare(**options | {"recover_text": str(other)}, out=tmp_path / "out")


def test_what_cannot_be_is_said_before_anything_is_pruned(options, tmp_path):
    with pytest.raises(UnknownName, match="There is no way to recover 'mask'"):
        secateur.compare(**options | {"recover": ["mask"]}, out=tmp_path / "out")
    with pytest.raises(NotEnoughText, match=r"Recovery was asked to see .* tokens"):
        secateur.compare(**options | {"recover_steps": 10**5}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_way_that_a_row_cannot_go_is_left_out_and_said(options, tmp_path):
    results = secateur.compare(
        **options | {"methods": ["fast"], "patterns": ["1 blocks"], "recover": ["blocks", "masked"]}, out=tmp_path
    )
    assert [bool(row.recovered) for row in results.rows] == [False, False, True]
    assert "cannot be matched" in results.not_timed["fast 1 block recovered by blocks in 3 steps"]


def test_a_recovery_that_is_none_is_refused(options, tmp_path):
    secateur.compare(**options, out=tmp_path)
    whole = (tmp_path / "results.json").read_text()
    for field in ("way", "steps", "tokens", "seconds", "rate", "seed", "text", "dtype"):
        for value in (None, ["odd"]):
            held = json.loads(whole)
            held["rows"][2]["recovered"][field] = value
            (tmp_path / "results.json").write_text(json.dumps(held))
            with pytest.raises(BadResults, match=f"rows.2.recovered.{field} is .*, which should be"):
                read_results(tmp_path)


def test_a_loss_of_nan_leaves_one_row_out(options, tmp_path, monkeypatch):
    real = training._Distilling.compute_loss
    monkeypatch.setattr(training._Distilling, "compute_loss", lambda *args, **more: real(*args, **more) * torch.nan)
    results = secateur.compare(**options | {"recover": ["masked", "blocks"], "methods": ["wanda"]}, out=tmp_path)
    assert [row.recovered.way for row in results.rows if row.recovered] == ["blocks"]
    assert "The loss became nan at step 1" in results.not_timed["wanda 2:4 recovered by masked in 3 steps"]


def test_joined_rows_of_other_recovery_text_are_not_ranked_against_each_other(options, tmp_path, text_file):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed(text_file.read_text().splitlines())))
    one = secateur.compare(**options | {"methods": ["wanda"]}, out=tmp_path / "one")
    secateur.compare(
        **options | {"methods": ["wanda"], "recover": ["blocks"], "recover_text": str(other)}, out=tmp_path / "two"
    )
    joined = secateur.report([tmp_path / "one", tmp_path / "two"], out=tmp_path / "both")
    trained = [row for row in joined.rows if row.recovered]
    assert len(trained) == 2
    assert all(not row.rank and not row.ties for row in trained)
    assert one.rows[2].recovered == trained[0].recovered
