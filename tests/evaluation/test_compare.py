"""The comparison: its rows, its ties, what it keeps, what it refuses; and one real model."""

import json
import shutil

import numpy as np
import pytest
from rich.table import Table

import secateur
from secateur.cli.tables import comparison_tables
from secateur.errors import ConditionsDiffer, SecateurError, UnsupportedModel
from secateur.evaluation.comparison import rows
from secateur.evaluation.report.write import markdown
from secateur.evaluation.results.ranking import rank
from secateur.evaluation.results.schema import Row
from secateur.kernels.library import library

needs_library = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")
FIELDS = {
    "method", "pattern", "kind", "sparsity", "perplexity", "delta", "delta_interval", "kl", "top1_agreement",
    "seconds", "peak_bytes", "disk_bytes", "rank", "ties", "checkpoint", "allocation", "parameters", "values",
    "latency", "calibration", "tasks", "sites", "loss", "searched", "recovered", "bits_per_byte", "acceptance",
    "bits", "stored_as", "byte_rank", "byte_ties",
}  # fmt: skip
TOP = [
    "schema", "model", "calibrations", "evaluation", "options", "machine", "versions", "command", "rows", "not_timed",
    "tolerance", "notes",
]  # fmt: skip


@pytest.fixture
def options(tiny_llama, text_file):
    return {
        "model": str(tiny_llama), "calibration": str(text_file), "evaluation": str(text_file), "samples": 8,
        "seq_len": 32, "windows": 30, "methods": ["magnitude", "wanda"], "patterns": ["50%", "2:4"],
        "command": ["secateur", "compare"],
    }  # fmt: skip


def test_results_hold_what_the_schema_says(options, tmp_path):
    results = secateur.compare(**options, out=tmp_path)
    held = json.loads((tmp_path / "results.json").read_text())
    assert list(held) == TOP
    assert all(row.keys() == FIELDS for row in held["rows"])
    assert [(row["method"], row["pattern"]) for row in held["rows"]] == [
        ("dense", "-"), ("magnitude", "50%"), ("wanda", "50%"), ("magnitude", "2:4"), ("wanda", "2:4"),
    ]  # fmt: skip
    assert [row["kind"] for row in held["rows"]] == ["dense", *["unstructured"] * 2, *["semi-structured"] * 2]
    assert [row["sparsity"] for row in held["rows"]] == [0, 0.5, 0.5, 0.5, 0.5]
    assert [draw["samples"] for draw in held["calibrations"]] == [8]
    assert [row["calibration"] for row in held["rows"]] == [None, None, 0, None, 0]  # magnitudes need no text
    assert all(row["latency"] == [] for row in held["rows"])
    for row in held["rows"][1:]:
        found = secateur.evaluate(
            str(tmp_path / row["checkpoint"]), dense=options["model"], evaluation=options["evaluation"],
            seq_len=32, windows=30,
        )  # fmt: skip
        assert row["perplexity"] == pytest.approx(found.perplexity, rel=1e-9)
        assert row["kl"] == pytest.approx(found.kl, rel=1e-6)
        assert row["seconds"].keys() == {"forward", "statistics", "solve", "refine", "plan"}
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md", "report.html", "rows", "checkpoints"}
    assert results.rows[0].perplexity == held["rows"][0]["perplexity"]


def test_a_finished_row_is_kept_and_only_what_is_missing_is_computed(options, tmp_path, monkeypatch):
    first = secateur.compare(**{**options, "patterns": ["50%"]}, out=tmp_path)
    pruned = []
    real = rows.prune_checkpoint

    def counted(opened, chosen, *args):
        pruned.append((chosen.recipe.method, chosen.recipe.pattern))
        return real(opened, chosen, *args)

    monkeypatch.setattr(rows, "prune_checkpoint", counted)
    (tmp_path / "rows" / "wanda-50pct.json").unlink()
    second = secateur.compare(**options, out=tmp_path)
    assert pruned == [("wanda", "50%"), ("magnitude", "2:4"), ("wanda", "2:4")]
    for one, other in zip(first.rows, second.rows, strict=False):
        assert (one.name, one.perplexity, one.delta_interval) == (other.name, other.perplexity, other.delta_interval)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"samples": 4}, "calibration"), ({"windows": 20}, "evaluation"), ({"skip": ["q_proj"]}, "skip")],
)
def test_rows_of_other_conditions_are_refused(options, tmp_path, changed, named):
    secateur.compare(**{**options, "methods": ["wanda"], "patterns": ["50%"]}, out=tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConditionsDiffer, match=f"was measured with {named} .* choose another --out"):
        secateur.compare(**{**options, **changed}, out=tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_another_config_is_another_model(options, tmp_path, tiny_llama):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    options |= {"model": str(model), "methods": ["magnitude"], "patterns": ["50%"]}
    secateur.compare(**options, out=tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ConditionsDiffer, match="was measured with config"):
        secateur.compare(**options, out=tmp_path / "out")


def test_a_row_whose_checkpoint_is_gone_is_made_again(options, tmp_path):
    options |= {"methods": ["magnitude"], "patterns": ["50%"]}
    secateur.compare(**options, out=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (row,) = secateur.compare(**options, out=tmp_path).rows[1:]
    assert (tmp_path / str(row.checkpoint) / "config.json").exists()


def row(method: str, loss: np.ndarray, pattern: str = "2:4", calibration: int | None = None) -> Row:
    held = Row(method, pattern, "semi-structured", 0.5, 0, 0, (0, 0), 0, 0, {}, None, 0)
    held.loss, held.calibration = loss.tolist(), calibration
    return held


def test_a_tie_is_not_ranked():
    draw = np.random.default_rng(0)
    hard = draw.normal(2, 0.5, 200)
    losses = {
        "a": hard,
        "b": hard + draw.normal(0, 0.05, 200),  # no real difference
        "c": hard + 0.1,
        "d": hard + 0.05,
    }
    rows = {name: row(name, loss) for name, loss in losses.items()}
    rows["e"] = row("e", hard - 1, "4:8")  # better than all, but another pattern
    rows["f"] = row("f", hard, "4:8")
    rows["g"] = row("g", hard - 2, calibration=1)  # better than all, but on other calibration text
    rows["h"] = row("h", hard - 3, calibration=1)
    rank(list(rows.values()))
    assert {name: found.rank for name, found in rows.items()} == {
        "a": "1-2 tie", "b": "1-2 tie", "c": "4", "d": "3", "e": "1", "f": "2", "g": "2", "h": "1",
    }  # fmt: skip
    assert rows["a"].ties == ["b 2:4"]
    assert rows["d"].ties == []


@needs_library
def test_rows_are_timed_and_rounded_ones_stand_apart(options, tmp_path):
    grid = {"methods": ["magnitude"], "patterns": ["60%", "25% of channels"], "values": ["as stored", "int8"]}
    grid["methods"] = ["magnitude", "energy"]
    speed = {"bench": ["eager", "packed", "packed-int8"], "bench_dtype": "float32"}
    results = secateur.compare(**options | grid | speed, out=tmp_path)
    rows = {row.name: row for row in results.rows}
    assert list(rows) == ["dense -", "magnitude 60%", "magnitude 60% int8", "energy 25% of channels"]
    exact, rounded = rows["magnitude 60%"], rows["magnitude 60% int8"]
    assert rounded.perplexity != exact.perplexity
    # its levels make up for the mask: magnitude alone changes no weight
    assert rounded.kl < exact.kl
    assert rounded.disk_bytes < exact.disk_bytes
    assert rounded.rank == exact.rank == ""  # each alone with its pattern and values
    timed = {name: [timing["runtime"] for timing in row.latency] for name, row in rows.items()}
    assert timed["magnitude 60%"] == ["eager", "packed"]
    assert timed["magnitude 60% int8"] == ["packed-int8"]
    assert timed["energy 25% of channels"] == ["eager"]
    assert "eager" in timed["dense -"]
    assert any("nothing to pack" in why for why in results.not_timed.values())
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["rows"][1]["latency"][1]["runtime"] == "packed"
    page = (tmp_path / "report.md").read_text()
    assert "tokens/s" in page
    assert "| packed |" in page or "| eager |" in page
    assert "No speed was measured" not in page
    again = secateur.compare(**options | grid, out=tmp_path)
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in results.rows]
    assert all(row.latency == [] for row in again.rows)
    with pytest.raises(SecateurError, match="There is no runtime 'pakced'"):
        secateur.compare(**options, bench=["pakced"], out=tmp_path / "other")
    with pytest.raises(SecateurError, match="'int5' is no kind of values"):
        secateur.compare(**options, values=["int5"], out=tmp_path / "other")


def test_a_row_that_cannot_be_timed_stands_without_a_figure(options, tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise UnsupportedModel("other logits. Nothing was timed.")

    monkeypatch.setattr("secateur.evaluation.comparison.timed_rows.bench", refuses)
    results = secateur.compare(
        **options | {"methods": ["magnitude"], "patterns": ["50%"]}, bench=["eager"], out=tmp_path
    )
    assert results.not_timed == {"magnitude 50%": "other logits. Nothing was timed."}
    assert [row.latency for row in results.rows] == [[], []]
    assert json.loads((tmp_path / "results.json").read_text())["not_timed"] == results.not_timed


def test_the_report_escapes_names_and_has_no_speed_column(options, tmp_path):
    results = secateur.compare(**{**options, "methods": ["magnitude"], "patterns": ["50%"]}, out=tmp_path)
    results.model["name"] = "<script>|`x`[red]"
    text = markdown(results)
    assert "<script>" not in text.replace("\\<script\\>", "")
    columns = text.splitlines()[2]
    assert "tokens/s" not in columns
    assert "8 samples" in text
    for characters in (80, 200):
        (shown,) = comparison_tables(results, characters).renderables
        assert isinstance(shown, Table)
        assert shown.row_count == 2


def test_a_real_model_ranks_the_methods(shared_data, tmp_path):
    """stories260K on TinyStories: SparseGPT before Wanda before magnitude, intervals apart."""
    stories = shared_data / "tinystories"
    results = secateur.compare(
        str(shared_data / "models" / "stories260K"), out=tmp_path, patterns=["50% of row", "2:4"], windows=100,
        calibration=str(stories / "v2_train_head.jsonl"), evaluation=str(stories / "valid_head.jsonl"), samples=32,
    )  # fmt: skip
    found = {row.name: row for row in results.rows}
    assert found["dense -"].perplexity == pytest.approx(3.6742, abs=0.001)
    for pattern, most in (("50% of row", 15), ("2:4", 35)):
        ranks = [found[f"{method} {pattern}"].rank for method in ("sparsegpt", "wanda", "magnitude")]
        assert ranks == ["1", "2", "3"]
        assert found[f"sparsegpt {pattern}"].perplexity < most


def test_structures_stand_beside_zeros(options, tmp_path):
    options |= {"methods": ["magnitude", "energy", "fast"], "patterns": ["50%", "25% of channels", "1 block"]}
    results = secateur.compare(**options, out=tmp_path)
    rows = [(row.method, row.pattern, row.kind) for row in results.rows]
    assert rows == [
        ("dense", "-", "dense"), ("magnitude", "50%", "unstructured"), ("fast", "50%", "unstructured"),
        ("energy", "25% of channels", "structured"), ("fast", "25% of channels", "structured"),
        ("fast", "1 block", "structured"),
    ]  # fmt: skip
    dense, zeros, *_, channels, block = results.rows
    assert dense.parameters == zeros.parameters
    assert dense.parameters > channels.parameters > block.parameters  # type: ignore[operator]
    assert "structured" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"methods": ["energy"], "patterns": ["25% of channels", "1 block"]}, "There is no method for 1 block"),
        ({"methods": ["magnitude"], "patterns": ["50%", "25% of channels"]}, "chooses single weights"),
        ({"methods": ["magnitude", "kl"], "patterns": ["50%"]}, "'kl' chooses whole structures"),
        ({"methods": ["fast"], "patterns": ["50%", "7 blocks"]}, "7 blocks was asked"),
        ({"methods": ["fast"], "patterns": ["50%", "25% of experts"]}, "has no experts"),
        ({"methods": ["fast"], "patterns": ["50%", "25% of channels"], "skip": ["q_proj"]}, "cannot leave one"),
        ({"methods": ["fast"], "patterns": ["25% of channels"], "allocate": ["owl"]}, "same out of every block"),
        ({"patterns": []}, "at least one method, pattern, rule of allocation and kind of values"),
    ],
)
def test_a_grid_with_an_impossible_row_is_refused_before_any_work(options, tmp_path, changed, words):
    with pytest.raises(SecateurError, match=words):
        secateur.compare(**{**options, **changed}, out=tmp_path / "out")
    assert not (tmp_path / "out" / "rows").exists()


def test_rows_from_before_bits_a_byte_are_found_again_and_get_theirs(options, tmp_path, monkeypatch):
    first = secateur.compare(**options, out=tmp_path)
    for file in (tmp_path / "rows").glob("*.json"):
        kept = json.loads(file.read_text())
        del kept["row"]["bits_per_byte"]
        file.write_text(json.dumps(kept))
    monkeypatch.setattr(rows.ComparisonContext, "_pruned", None)  # nothing is pruned again
    again = secateur.compare(**options, out=tmp_path)
    assert [row.bits_per_byte for row in again.rows] == [row.bits_per_byte for row in first.rows]
    for row in again.rows:  # of the byte tokenizer, bits a byte are nearly bits a token
        assert row.bits_per_byte == pytest.approx(np.log2(row.perplexity), rel=0.02)


def test_a_comparison_from_before_bits_a_byte_is_read_and_shown_without(options, tmp_path):
    results = secateur.compare(**options, out=tmp_path)
    assert "bits a byte" in markdown(results)
    held = json.loads((tmp_path / "results.json").read_text())
    del held["notes"]
    for row in held["rows"]:
        del row["bits_per_byte"]
    (tmp_path / "old.json").write_text(json.dumps(held))
    joined = secateur.report([tmp_path / "old.json"], out=tmp_path / "page")
    assert "bits a byte" not in markdown(joined)
