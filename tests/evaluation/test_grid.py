"""What a comparison can hold besides its table: ranges, draws of calibration text, a search for a tolerance, tasks."""

import json
import shutil
from collections.abc import Callable, Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import secateur
from secateur.errors import BadPattern, BadText, ConditionsDiffer, SecateurError
from secateur.evaluation.comparison.grid import Cell, cells, expand
from secateur.evaluation.comparison.tolerance import search_tolerance
from secateur.evaluation.report.tables import sheets
from secateur.evaluation.results.schema import Results, Row, find_tolerance, read_results
from secateur.system.settings import Grid


@pytest.fixture(scope="module")
def options(tiny_llama, text_file) -> dict[str, Any]:
    return {
        "model": str(tiny_llama), "calibration": str(text_file), "evaluation": str(text_file), "samples": 8,
        "seq_len": 32, "windows": 30, "methods": ["magnitude", "wanda"], "patterns": ["50%"],
        "command": ["secateur", "compare"],
    }  # fmt: skip


def test_ranges_are_written_out():
    assert expand(["10%..40%"]) == ["10%", "20%", "30%", "40%"]
    assert expand(["30%..40%/5%", "2:4"]) == ["30%", "35%", "40%", "2:4"]
    assert expand(["10%..30%/20% of channels"]) == ["10% of channels", "30% of channels"]
    assert expand(["50%", "40%..60%"]) == ["50%", "40%", "60%"]
    found = cells(Grid(methods=["wanda", "energy"], patterns=["20%..30% of channels", "50%"]))
    assert [(cell.method, cell.pattern) for cell in found] == [
        ("energy", "20% of channels"), ("energy", "30% of channels"), ("wanda", "50%"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pattern", ["10%..", "80%..10%", "10%..80%/0%", "10%..80%/000%", "1:4..2:4", "10..80", "10%..20%..30%"]
)
def test_an_odd_range_is_refused(pattern):
    with pytest.raises(BadPattern, match=r"is no range of patterns\. Say '10%\.\.80%'"):
        expand([pattern])


def sheet(results: Results, title: str) -> list[dict[str, str]]:
    """The lines of the sheet whose title starts so, as text."""
    (found,) = [held for held in sheets(results) if held.title.startswith(title)]
    return [{column: figure[0] for column, figure in line.items()} for line in found.lines]


def test_draws_stand_apart_from_the_table(options, tmp_path, text_file):
    """Every draw gives what a comparison with that draw alone gives; none is ranked against another."""
    several = options | {"samples": [2, 8], "seed": [0, 1]}
    results = secateur.compare(**several, out=tmp_path / "all")
    assert [(draw["samples"], draw["seed"]) for draw in results.calibrations] == [(8, 0), (8, 1), (2, 0), (2, 1)]
    assert [(row.method, row.calibration) for row in results.rows] == [
        ("dense", None), ("magnitude", None), ("wanda", 0), ("wanda", 1), ("wanda", 2), ("wanda", 3),
    ]  # fmt: skip
    assert [row.name for row in results.table] == ["dense -", "magnitude 50%", "wanda 50%"]
    for number, draw in enumerate(results.calibrations):
        alone = secateur.compare(
            **options | {"samples": draw["samples"], "seed": draw["seed"], "methods": ["wanda"]},
            out=tmp_path / str(number),
        )  # fmt: skip
        (row,) = [row for row in results.rows if row.calibration == number]
        assert row.loss == alone.rows[1].loss
        assert (row.checkpoint is None) == (number > 0)  # a checkpoint for the table alone
    assert all(row.ties == [] and row.rank == "" for row in results.rows if row.calibration)
    values = {number: row.perplexity for row in results.rows if (number := row.calibration) is not None}
    lines = sheet(results, "How much hangs")
    assert [(line["samples"], line["seeds"]) for line in lines] == [("2", "2"), ("8", "2")]
    assert lines[1]["lowest to highest"] == f"{min(values[0], values[1]):.2f} to {max(values[0], values[1]):.2f}"
    assert "How much hangs" in (tmp_path / "all" / "report.md").read_text()
    assert "Perplexity by calibration text" in (tmp_path / "all" / "report.html").read_text()
    again = secateur.compare(**several, out=tmp_path / "all")
    assert [row.loss for row in again.rows] == [row.loss for row in results.rows]
    with pytest.raises(ConditionsDiffer, match="was measured with calibration"):  # of which these know nothing
        secateur.compare(**options | {"samples": 4}, out=tmp_path / "all")


def test_several_texts_are_draws(options, tmp_path, text_file):
    other = tmp_path / "other.jsonl"
    lines = text_file.read_text().splitlines()
    other.write_text("\n".join(reversed(lines)) + "\n")
    texts = {"calibration": [str(text_file), str(other)], "methods": ["wanda"]}
    results = secateur.compare(**options | texts, out=tmp_path / "out")
    assert [draw["source"] for draw in results.calibrations] == texts["calibration"]
    assert [line["text"] for line in sheet(results, "How much hangs")] == ["documents.jsonl", "other.jsonl"]


def test_a_tolerance_is_found_by_bisection(options, tmp_path):
    """The percent that is found is within, the next is not; rows at hand are used, others lose their weights."""
    wide = options | {"patterns": ["10%", "60%"], "tolerance": 0.002}
    results = secateur.compare(**wide, out=tmp_path)
    dense = results.dense.perplexity
    rows = {row.name: row for row in results.rows}
    for reach in results.tolerance["found"]:
        best = rows[f"{reach['method']} {reach['pattern']}"]
        beyond = rows[f"{reach['method']} {reach['beyond']}"]
        assert int(reach["beyond"][:-1]) == int(reach["pattern"][:-1]) + 1
        assert best.perplexity <= dense * 1.002 < beyond.perplexity
        assert reach["certain"] == (dense + best.delta_interval[1] <= dense * 1.002)
        assert best.checkpoint
        assert best in results.table
    searched = [row for row in results.rows if row.searched]
    assert searched
    assert all(row.checkpoint is None for row in searched)
    kept = {str(row.checkpoint).split("/")[1] for row in results.table if row.checkpoint}
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == kept
    again = secateur.compare(**wide, out=tmp_path)
    assert again.tolerance == results.tolerance
    # What a search has passed by comes back whole when it is asked for.
    share = searched[0].pattern
    asked = secateur.compare(**options | {"methods": [searched[0].method], "patterns": [share]}, out=tmp_path)
    assert (tmp_path / str(asked.rows[1].checkpoint) / "config.json").exists()
    assert asked.rows[1].loss == searched[0].loss


class Told:
    """A ground where the perplexity of a share is given; the dense model has 10."""

    def __init__(self, perplexity: Callable[[int], float], refused: Container[int] = ()) -> None:
        self.refused = refused
        self.perplexity, self.asked, self.draws, self.store = perplexity, list[str](), [None], self

    def dense_row(self) -> Row:
        return self.made("-", 10.0)

    def row(self, cell: Cell, draw: object, *, searching: bool = False) -> Row:
        percent = int(cell.pattern.split("%")[0])
        if percent in self.refused:
            raise BadPattern(f"{percent} cannot be had")
        if searching:
            self.asked.append(cell.pattern)
        return replace(self.made(cell.pattern, self.perplexity(percent)), searched=searching)

    def made(self, pattern: str, perplexity: float) -> Row:
        delta = perplexity - 10
        return Row("wanda", pattern, "", 0, perplexity, delta, (delta - 0.1, delta + 0.1), 0, 0, {}, None, 0)

    def forget(self, row: Row) -> None:
        """Nothing lies anywhere."""

    put = forget


@pytest.mark.parametrize(
    ("perplexity", "found"),
    [
        (lambda share: 10 + share / 32, ("32% of row", False, "33% of row")),  # 11 itself is within
        (lambda share: 10.5 if share < 64 else 20, ("63% of row", True, "64% of row")),
        (lambda share: 12, (None, False, "1% of row")),
        (lambda share: 10.5, ("95% of row", True, None)),
    ],
)
def test_the_end_of_a_tolerance(perplexity, found):
    told: Any = Told(perplexity)
    grid = [Cell("wanda", "50% of row", "uniform"), Cell("wanda", "2:4", "uniform")]
    (reach,), made = search_tolerance(told, grid, [], 0.1)
    assert (reach.pattern, reach.certain, reach.beyond) == found
    assert len(told.asked) == len(set(told.asked)) <= 7
    assert [row.pattern for row in made if not row.searched] == [reach.pattern] * (reach.pattern is not None)


def test_a_tolerance_is_read_as_it_is_written():
    assert find_tolerance("5%") == find_tolerance("0.05") == find_tolerance(0.05) == 0.05
    assert find_tolerance(None) is None


def test_a_tolerance_without_a_share_to_search_is_refused(options, tmp_path):
    with pytest.raises(BadPattern, match="add a pattern such as '50%'"):
        secateur.compare(**options | {"patterns": ["2:4"]}, tolerance="5%", out=tmp_path)


@pytest.mark.parametrize("text", ["0%", "100%", "-5%", "five", "nan", "5"])
def test_an_odd_tolerance_is_refused(options, tmp_path, text):
    with pytest.raises(BadPattern, match="A tolerance is a share of the dense perplexity such as '5%'"):
        secateur.compare(**options, tolerance=text, out=tmp_path)


def test_percents_that_are_refused_bound_a_search():
    """As where one step of aligned channels is more than one percent, and the last step leaves nothing."""
    cell = Cell("wanda", "20% of channels", "uniform")
    told: Any = Told(lambda share: 10.2, refused=[*range(1, 13), *range(80, 96)])
    (reach,), _ = search_tolerance(told, [cell], [told.made("20% of channels", 10.2)], 0.1)
    assert (reach.pattern, reach.beyond, reach.note) == ("79% of channels", "80% of channels", "80 cannot be had")
    told = Told(lambda share: 12.0, refused=range(1, 13))
    (reach,), _ = search_tolerance(told, [cell], [told.made("20% of channels", 12.0)], 0.1)
    assert (reach.pattern, reach.beyond, reach.note) == (None, "13% of channels", "")


def test_two_searches_in_one_folder(options, tmp_path):
    """What one search passed by and another finds has weights again; a table of before keeps its own."""
    options = options | {"methods": ["magnitude"]}
    before = secateur.compare(**options | {"patterns": ["70%"]}, out=tmp_path).rows[1]
    known = {row.pattern: row for row in secateur.compare(**options, tolerance=1e-4, out=tmp_path).rows}
    passed = [row for row in known.values() if row.searched]
    assert passed
    for share in (0.001, 0.01, 0.1):
        results = secateur.compare(**options, tolerance=share, out=tmp_path)
        (reach,) = results.tolerance["found"]
        (row,) = [row for row in results.table if row.pattern == reach["pattern"]]
        assert (tmp_path / str(row.checkpoint) / "config.json").is_file()
    assert (tmp_path / str(before.checkpoint) / "config.json").is_file()


def test_a_run_that_dies_while_it_deletes_goes_on(options, tmp_path, monkeypatch):
    options = options | {"methods": ["wanda"], "seed": [0, 1]}
    real = shutil.rmtree

    def dies(place, *args, **more):
        if str(place).endswith(".forgotten") and Path(place).exists():
            raise KeyboardInterrupt
        real(place, *args, **more)

    monkeypatch.setattr("secateur.evaluation.comparison.rows.shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        secateur.compare(**options, out=tmp_path)
    monkeypatch.undo()
    results = secateur.compare(**options, out=tmp_path)
    assert [row.calibration for row in results.rows] == [None, 0, 1]


def names(**grid) -> list[str]:
    return [cell.name for cell in cells(Grid(**grid))]


def test_every_kind_of_values_makes_a_row_of_zeros_and_none_of_a_structure():
    values = ("as stored", "int4 of 64")
    assert names(methods=("wanda", "energy"), patterns=("50%", "25% of channels"), values=values) == [
        "wanda 50%", "wanda 50% int4 of group 64", "energy 25% of channels",
    ]  # fmt: skip


def test_nothing_taken_out_is_a_row_for_each_way_to_quantise_alone():
    grid = {"methods": ("wanda", "sparsegpt", "default", "default+refine", "best"), "patterns": ("0%",)}
    assert names(**grid, values=("as stored", "int8")) == [
        "wanda 0% int8", "default+refine 0% int8", "best 0% int8",
    ]  # fmt: skip
    with pytest.raises(BadPattern, match=r"0% as stored is the dense model\. Add --values, such as 'int4'\."):
        names(**grid)


def bytes_of(row: Row, out: Path, **how: Any) -> int:
    """What the tensors of a row take in the format that it names, written."""
    secateur.export(out / str(row.checkpoint), out=out / "file", to=str(row.stored_as), overwrite=True, **how)
    return sum(
        tensor.nbytes
        for file in (out / "file").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if not name.endswith("weight_shape")
    )


@pytest.mark.parametrize(("pattern", "bits"), [("0%", 4), ("30%", 4), ("60%", 4), ("60%", 3), ("60%", 2)])
def test_what_is_left_out_or_has_few_zeros_takes_what_it_takes(options, tmp_path, pattern, bits):
    values = [f"int{bits} of 64"]
    grid = {"methods": ["default"], "patterns": [pattern], "values": values, "skip": ["*up_proj", "*o_proj"]}
    row = secateur.compare(**options | grid, out=tmp_path).rows[1]
    assert row.stored_as == ("packed" if pattern == "60%" else "compressed-tensors")
    assert bytes_of(row, tmp_path) == pytest.approx(row.disk_bytes, rel=0.02)  # a header, and slack, of a small model


def test_a_tolerance_is_searched_with_values_as_stored(options, tmp_path):
    wide = options | {"methods": ["magnitude"], "tolerance": 0.5, "values": ["as stored", "int8"]}
    results = secateur.compare(**wide, out=tmp_path)
    assert len(results.tolerance["found"]) == 1
    assert {row.values for row in results.rows if row.pattern != "50%"} == {"as stored"}


def test_rows_at_equal_bytes_are_ranked_whatever_their_pattern(options, tmp_path):
    grid = {"methods": ["default"], "patterns": ["0%", "50%"], "values": ["as stored", "int3 of 64", "int4 of 64"]}
    results = secateur.compare(**options | grid, out=tmp_path)
    rows = {(row.pattern, row.values.split()[0]): row for row in results.rows}
    pruned, plain = rows["50%", "int4"], rows["0%", "int3"]
    assert plain.kind == "quantised"
    assert plain.bits == pytest.approx(3 + 16 / 64)
    assert (pruned.stored_as, plain.stored_as) == ("packed", "compressed-tensors")
    for row in (pruned, plain):
        assert bytes_of(row, tmp_path) == pytest.approx(row.disk_bytes, rel=0.02)
    assert abs(pruned.disk_bytes / plain.disk_bytes - 1) < 0.03
    assert pruned.byte_rank
    assert plain.byte_rank
    assert rows["-", "as"].byte_rank == rows["50%", "as"].byte_rank == ""
    assert rows["50%", "as"].bits == 32  # the model is float32
    held = read_results(tmp_path)
    assert [row.byte_rank for row in held.rows] == [row.byte_rank for row in results.rows]
    page = (tmp_path / "report.md").read_text()
    assert "rank at equal bytes" in page
    assert "Rank at equal bytes: among the rows on a grid within 3% of its bytes, whatever the pattern." in page
    advice = secateur.recommend(tmp_path, goal="memory", max_perplexity_increase="99%")
    assert "at equal bytes" in str(advice) or "at these bytes" in str(advice)


def test_passes_are_those_of_the_rows_that_are_there(options, tmp_path, monkeypatch):
    """What memory is free must not decide whether a comparison can go on."""
    options = options | {"methods": ["wanda"]}
    secateur.compare(**options | {"passes": "two"}, out=tmp_path)
    results = secateur.compare(**options | {"patterns": ["50%", "60%"]}, out=tmp_path)
    assert results.options["passes"] == "two"


def test_rows_answer_tasks_like_evaluate(shared_data, tmp_path):
    """The task columns are what `evaluate` gives for each checkpoint; answers are kept, and asked again if need be."""
    pytest.importorskip("lm_eval")
    stories = shared_data / "tinystories"
    model = str(shared_data / "models" / "stories260K")
    options: dict[str, Any] = {
        "calibration": str(stories / "v2_train_head.jsonl"), "evaluation": str(stories / "valid_head.jsonl"),
        "samples": 4, "seq_len": 64, "windows": 20, "methods": ["magnitude"], "patterns": ["50% of row"],
        "data_dir": str(shared_data), "tasks": ["rte", "openbookqa"], "limit": 20,
    }  # fmt: skip
    results = secateur.compare(model, **options, out=tmp_path)
    dense, row = results.rows
    found = secateur.evaluate(
        str(tmp_path / str(row.checkpoint)), dense=model, evaluation=options["evaluation"], seq_len=64, windows=20,
        tasks=options["tasks"], limit=20, data_dir=str(shared_data),
    )  # fmt: skip
    assert row.tasks == found.tasks
    assert dense.tasks["mean"]["delta"] == 0
    assert {"rte", "openbookqa", "mean"} == row.tasks.keys()
    page = (tmp_path / "report.html").read_text()
    assert "difference on tasks" in page
    assert "Zero-shot accuracy" in page
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "tasks").iterdir()}
    assert len(kept) == 4
    again = secateur.compare(model, **options, out=tmp_path)
    assert [row.tasks for row in again.rows] == [row.tasks for row in results.rows]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "tasks").iterdir()} == kept
    fewer = secateur.compare(model, **{**options, "limit": 10}, out=tmp_path)
    assert fewer.rows[1].tasks["rte"]["items"] == 10
    shutil.rmtree(tmp_path / "rows")  # as one is told to, to go on under other conditions
    others = {**options, "samples": 2, "methods": ["wanda"]}
    fresh = secateur.compare(model, **others, out=tmp_path / "fresh").rows[1].tasks
    assert secateur.compare(model, **others, out=tmp_path).rows[1].tasks == fresh
    with pytest.raises(BadText, match="hellaswag"):
        secateur.compare(model, **{**options, "tasks": ["hellaswag"]}, out=tmp_path)


# The report of several comparisons.


@pytest.fixture(scope="module")
def two(options, tmp_path_factory):
    """Two comparisons of one kind, of different methods. Read only."""
    place = tmp_path_factory.mktemp("two")
    one, other = place / "one", place / "other"
    secateur.compare(**options | {"methods": ["magnitude"]}, out=one)
    secateur.compare(**options | {"methods": ["wanda"], "seed": [0, 1]}, out=other)
    return one, other


def test_comparisons_are_joined_and_ranked_anew(two, options, tmp_path):
    joined = secateur.report(two, out=tmp_path / "joined")
    together = secateur.compare(**options, out=tmp_path / "together")
    assert [(row.name, row.calibration) for row in joined.rows] == [
        ("dense -", None), ("magnitude 50%", None), ("wanda 50%", 0), ("wanda 50%", 1),
    ]  # fmt: skip
    assert [(row.name, row.rank, row.ties, row.loss) for row in joined.table] == [
        (row.name, row.rank, row.ties, row.loss) for row in together.rows
    ]
    assert {file.name for file in (tmp_path / "joined").iterdir()} == {"results.json", "report.md", "report.html"}
    assert read_results(tmp_path / "joined") == joined
    twice = secateur.report([two[0] / "results.json", two[0]], out=tmp_path / "twice")
    assert [row.name for row in twice.rows] == ["dense -", "magnitude 50%"]


@pytest.fixture(scope="module")
def of_wanda(options, tmp_path_factory) -> Path:
    """A comparison of one method. Read only."""
    folder = tmp_path_factory.mktemp("wanda")
    secateur.compare(**options | {"methods": ["wanda"]}, out=folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"windows": 20}, "differ in evaluation samples: 30 and 20"),
        ({"samples": 4}, "differ in calibration samples: 8 and 4"),
        ({"seed": 7}, "differ in calibration seed: 0 and 7"),
        ({"skip": ["*q_proj"]}, "differ in options skip"),
        ({"passes": "two"}, "differ in options passes: one and two"),
    ],
)
def test_other_conditions_are_named(options, of_wanda, tmp_path, changed, words):
    secateur.compare(**options | {"methods": ["wanda"]} | changed, out=tmp_path / "other")
    with pytest.raises(ConditionsDiffer, match=words):
        secateur.report([of_wanda, tmp_path / "other"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_is_named(two, tmp_path, tiny_llama, options):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    secateur.compare(**options | {"model": str(model), "methods": ["wanda"]}, out=tmp_path / "third")
    with pytest.raises(ConditionsDiffer, match="differ in model shards"):
        secateur.report([two[0], tmp_path / "third"], out=tmp_path / "out")


def test_one_row_with_two_results_is_refused(two, tmp_path):
    file = two[0] / "results.json"
    held = json.loads(file.read_text())
    held["rows"][1]["loss"][0] += 0.5
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(json.dumps(held))
    with pytest.raises(ConditionsDiffer, match="differ in the row magnitude 50%"):
        secateur.report([file, spoilt], out=tmp_path / "out")
    held["rows"][1]["loss"] = []
    spoilt.write_text(json.dumps(held))
    with pytest.raises(SecateurError, match="has no loss of 'magnitude 50%', so it cannot be ranked anew"):
        secateur.report([file, spoilt], out=tmp_path / "out")
