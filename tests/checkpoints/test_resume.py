"""A run that dies costs nothing: the same command goes on, and ends in the same bytes."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dying import MOMENTS, started

from secateur.checkpoints import folder as checkpoint
from secateur.checkpoints import result as output
from secateur.checkpoints import result_folder
from secateur.checkpoints.journal import Journal, differences
from secateur.errors import Interrupted, OutputRefused, UnsupportedModel
from secateur.models.stream import distil
from secateur.models.stream import steps as stepping
from secateur.pruning import distil as tuning
from secateur.pruning.prune import prune

DIED = -signal.SIGKILL
CASES = {
    "zeros": ["--method", "sparsegpt", "--pattern", "50%"],
    "two streams": ["--method", "sweep+dense-target+refine", "--pattern", "2:4"],
    "two passes": ["--method", "wanda", "--pattern", "50%", "--passes", "two", "--memory", "0"],
    "a plan": ["--method", "wanda", "--pattern", "60%", "--allocate", "owl"],
    "a structure": ["--method", "energy+repair", "--pattern", "25% of channels"],
    "values": ["--method", "sparsegpt", "--pattern", "2:4", "--values", "int4 of group 32"],
    "values that are refined": ["--method", "alps+refine", "--values", "int3 of row by joint"],
    "values alone": ["--method", "default", "--pattern", "0%", "--values", "nvfp4"],
    "tuned together": ["--method", "wanda+distil", "--pattern", "50%"],
    "values tuned together": ["--method", "alps-fast+distil", "--pattern", "50%", "--values", "int3 of row"],
    "blocks": ["--method", "influence", "--pattern", "1 blocks"],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def arguments(tiny_llama, text_file, tmp_path, capfd):
    """The command line of a run that writes `tmp_path/place/out`, four blocks of a tiny model."""
    (tmp_path / "place").mkdir()

    def build(*more: object) -> list[str]:
        words = [
            "prune", tiny_llama, "--out", tmp_path / "place" / "out", "--calibration", text_file, "--samples", 6,
            "--seq-len", 16, "--batch-size", 2, "--quiet", *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return build


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "place" / "out"


def undisturbed(arguments: list[str], out: Path) -> dict[str, bytes]:
    assert started(arguments) == 0
    found = contents(out)
    shutil.rmtree(out)
    return found


@pytest.mark.parametrize("stage", MOMENTS)
def test_killed_at_every_stage(arguments, out, stage):
    """Before and after its first call, then a bit later; then it may end."""
    given = arguments("--method", "wanda")
    expected = undisturbed(given, out)
    statuses = [started(given, (MOMENTS[stage], n, when)) for n, when in ((1, "before"), (1, "after"), (4, "after"))]
    assert DIED in statuses
    assert set(statuses) <= {0, 2, DIED}  # 2: it had ended before, so its result is in the way
    if statuses[-1] == DIED:
        assert started(given) in (0, 2)
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_goes_on_after_the_last_finished_block(arguments, out, case, capfd):
    """It dies as the third block is recorded; the second run writes the other two alone."""
    given = arguments(*CASES[case])
    expected = undisturbed(given, out)
    writes = "secateur.checkpoints.result.Output._commit"
    assert started(given, (writes, 3, "before")) == DIED
    journal = out.with_name(".out.journal").read_text()
    assert journal.count('["block"') == 2
    assert started(given, (writes, 99, "before")) == 0
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["step", "judge", "end", "rewrite", "write"])
@pytest.mark.parametrize("case", ["tuned together", "values tuned together"])
@pytest.mark.filterwarnings("ignore")
def test_goes_on_where_all_blocks_are_tuned(arguments, out, place, case, monkeypatch, capfd):
    """It dies before and after a step, as it judges, before and after the result is written again."""
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(stepping, "STEP_TOKENS", 32)
    monkeypatch.setattr(distil.Distillation, "judge", lambda self: 1 / (1 + self.done))  # so that it is written
    given = arguments(*CASES[case])
    expected = undisturbed(given, out)
    owner = {
        "rewrite": "secateur.models.stream.block_writer.BlockWriter",
        "write": "secateur.checkpoints.result.Output",
    }.get(place, "secateur.models.stream.distil.Distillation")
    for number, when in ((2 if place == "step" else 1, "before"), (1, "after")):
        number += 4 * (place == "write")  # the blocks come first
        assert started(given, (f"{owner}.{place}", number, when)) == DIED
        if place == "write":
            shutil.rmtree(out.parent)
            out.parent.mkdir()
    assert started(given) == 0
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_was_tuned_in_memory_goes_on_in_a_file(arguments, out, monkeypatch):
    """And dies there, and goes on in memory."""
    monkeypatch.setattr(tuning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(stepping, "STEP_TOKENS", 32)
    given, step = arguments(*CASES["tuned together"]), "secateur.models.stream.distil.Distillation.step"
    expected = undisturbed(given, out)
    assert started(given, (step, 2, "before")) == DIED
    assert started([*given, "--memory", "1MB"], (step, 2, "before")) == DIED
    assert started(given) == 0
    assert contents(out) == expected


def test_a_refusal_for_memory_keeps_what_is_finished(arguments, out, monkeypatch, capfd):
    """All blocks were pruned when there was room for tuning them; there is none as the run is taken up."""
    given = arguments(*CASES["tuned together"])
    expected = undisturbed(given, out)
    assert started(given, ("secateur.models.stream.distil.Distillation.step", 1, "before")) == DIED

    def refuse(*_: object) -> bool:
        raise UnsupportedModel("there is no room")

    with monkeypatch.context() as short:
        short.setattr(tuning, "tuned_in_file", refuse)
        assert started(given) == 2
    assert "there is no room" in capfd.readouterr().err
    assert started(given) == 0
    assert contents(out) == expected


def test_other_options_are_refused_with_what_differs(arguments, out, capfd):
    assert started(arguments("--method", "wanda"), ("secateur.checkpoints.result.Output._commit", 3, "before")) == DIED
    left = out.with_name(".out.journal").read_bytes()
    assert started(arguments("--method", "sparsegpt", "--batch-size", "3")) == 2
    said = capfd.readouterr().err
    assert "A half-finished run for " in said
    assert 'batch_size was 2, now 3; method was "wanda", now "sparsegpt".' in said
    assert "discard it with --restart" in said
    assert out.with_name(".out.journal").read_bytes() == left
    assert started(arguments("--method", "sparsegpt", "--restart")) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["zeros", "a structure"])
def test_another_seed_is_refused(arguments, out, case, capfd):
    """Other calibration tokens: blocks that were pruned on the old ones are not gone on from."""
    assert started(arguments(*CASES[case]), ("secateur.checkpoints.result.Output._commit", 3, "before")) == DIED
    left = out.with_name(".out.journal").read_bytes()
    assert started(arguments(*CASES[case], "--seed", 1)) == 2
    said = capfd.readouterr().err
    assert "calibration.seed was 0, now 1" in said
    assert "calibration.sha256 was " in said
    assert out.with_name(".out.journal").read_bytes() == left


def test_a_finished_run_is_not_mistaken_for_a_half_finished_one(arguments, out, capfd):
    """It died after its last rename: the same command is content, another sees a folder that exists."""
    given = arguments("--method", "wanda")
    assert started(given, ("secateur.checkpoints.journal.Journal.remove", 1, "before")) == DIED
    expected = contents(out)
    assert started(arguments("--method", "sparsegpt")) == 2
    assert "exists already" in capfd.readouterr().err
    assert contents(out) == expected


def test_power_cut(tiny_llama, text_file, out, monkeypatch):
    """What was not synced is lost: after every sync the run may die, and only what was synced is still there."""
    disk: dict[Path, bytes | None] = {}  # what is safe: contents of files, None for names in folders
    real = output.sync
    syncs = 0

    class Cut(BaseException):
        pass

    def sync(path: Path) -> None:
        nonlocal syncs
        real(path)
        if path.is_file():
            disk[path] = path.read_bytes()
        syncs += 1
        if syncs == limit:
            raise Cut

    def cut() -> None:
        """Every file goes back to what was last synced of it."""
        for path in out.parent.rglob("*"):
            if path.is_file() and path.name != ".out.journal":
                path.write_bytes(disk.get(path, b"\0" * 10))

    def run() -> None:
        prune(
            tiny_llama, out=out, method="wanda", calibration=str(text_file), samples=6, seq_len=16, batch_size=2,
            command=["test"],
        )  # fmt: skip

    out.parent.mkdir(exist_ok=True)
    limit = -1
    monkeypatch.setattr(output, "sync", sync)
    monkeypatch.setattr(result_folder, "sync", sync)
    run()
    expected = contents(out)
    for limit in range(1, syncs):
        shutil.rmtree(out, ignore_errors=True)
        disk.clear()
        syncs = 0
        with pytest.raises(Cut):
            run()
        cut()
        syncs = -1000
        run()
        assert contents(out) == expected, limit


@pytest.fixture
def on_ctrl_c() -> Iterator[Callable[[Any], Any]]:
    """Sets what Ctrl-C does in this process, and sets it back: a suite that a script started in the background has
    inherited that it does nothing."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_after_the_block_at_hand(tiny_llama, text_file, out, monkeypatch, capsys, on_ctrl_c):
    out.parent.mkdir(exist_ok=True)
    on_ctrl_c(signal.default_int_handler)
    real, commits = output.Output.commit, 0

    def commit(self, tensors, block):
        nonlocal commits
        commits += 1
        if commits == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, tensors, block)

    monkeypatch.setattr(output.Output, "commit", commit)
    options: dict[str, Any] = dict(
        out=out, method="wanda", calibration=str(text_file), samples=6, seq_len=16, command=["test"]
    )
    words = "Stopped. The same command goes on after the 2 blocks that are finished."
    with pytest.raises(Interrupted, match=words):
        prune(tiny_llama, **options)
    assert "stopping after the block or step at hand; Ctrl-C once more stops at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not out.exists()
    prune(tiny_llama, **options)
    assert commits == 4
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_run_that_was_started_deaf_to_ctrl_c_stays_so(tiny_llama, text_file, out, monkeypatch, capsys, on_ctrl_c):
    """`nohup secateur prune … &` in a script: Ctrl-C there is not meant for it."""
    out.parent.mkdir(exist_ok=True)
    on_ctrl_c(signal.SIG_IGN)
    real, commits = output.Output.commit, 0

    def commit(self, tensors, block):
        nonlocal commits
        commits += 1
        os.kill(os.getpid(), signal.SIGINT)
        real(self, tensors, block)

    monkeypatch.setattr(output.Output, "commit", commit)
    prune(tiny_llama, out=out, method="wanda", calibration=str(text_file), samples=6, seq_len=16, command=["test"])
    assert commits == 4
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert "Ctrl-C" not in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_source_that_changes_during_the_run(tiny_llama, text_file, out, tmp_path, monkeypatch):
    out.parent.mkdir(exist_ok=True)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    real = output.Output.finish

    def finish(self, record):
        os.utime(model / "model.safetensors", ns=(1, 1))
        real(self, record)

    monkeypatch.setattr(output.Output, "finish", finish)
    with pytest.raises(checkpoint.BadCheckpoint, match=r"model\.safetensors was changed while it was read"):
        prune(model, out=out, method="magnitude", calibration=str(text_file), samples=6, seq_len=16)
    assert list(out.parent.iterdir()) == []


def test_a_source_that_changed_between_the_runs(arguments, out, tiny_llama, tmp_path, capfd):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    given = [str(model) if word == str(tiny_llama) else word for word in arguments("--method", "wanda")]
    assert started(given, ("secateur.checkpoints.result.Output._commit", 3, "before")) == DIED
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert started(given) == 2
    assert "files.model.safetensors was" in capfd.readouterr().err


def test_a_journal_that_was_cut_short(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.conditions is None
    journal.begin({"method": "wanda"})
    journal.add("block", {"number": 0})
    journal.add("block", {"number": 1})
    journal.close()
    whole = (tmp_path / "journal").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "journal").write_bytes(whole[:end])
        again = Journal(tmp_path / "journal")
        assert again.of("block") == [{"number": n} for n in range(again.entries.__len__())]
        assert (again.conditions is None) == (end <= whole.index(b"\n"))
        again.close()
    damaged = bytearray(whole)
    damaged[whole.index(b"number")] ^= 1
    (tmp_path / "journal").write_bytes(damaged)
    again = Journal(tmp_path / "journal")
    assert again.entries == []
    again.close()


def test_two_runs_at_once(tmp_path):
    held = Journal(tmp_path / "journal")
    with pytest.raises(OutputRefused, match="Another run is writing there"):
        Journal(tmp_path / "journal")
    held.remove()
    assert list(tmp_path.iterdir()) == []


def test_differences_in_words():
    assert differences({"a": 1, "b": [1]}, {"a": 2, "b": (1,), "c": "<x>"}) == [
        "a was 1, now 2", 'c was null, now "<x>"'
    ]  # fmt: skip
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    before, now = ({"calibration": {"text": "t" * 200, "seed": seed}} for seed in (0, 1))
    assert differences(before, now) == ["calibration.seed was 0, now 1"]
    assert differences({"plan": None}, {"plan": {"a": 1}}) == ['plan was null, now {"a": 1}']


@pytest.mark.parametrize("values", ["as stored", "int4 of row"])
def test_a_comparison_goes_on_inside_a_row(tiny_llama, text_file, out, capfd, values):
    given = [
        "compare", str(tiny_llama), "--out", str(out), "--methods", "wanda", "--patterns", "50%", "--values", values,
        "--calibration",
        str(text_file), "--evaluation", str(text_file), "--samples", "6", "--windows", "8", "--seq-len", "16",
        "--batch-size", "2", "--quiet",
    ]  # fmt: skip
    assert started(given, ("secateur.checkpoints.result.Output._commit", 3, "before")) == DIED
    assert started(given) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "wanda"]
    name = "wanda-50pct" if values == "as stored" else "wanda-50pct-int4-of-row"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [name]


assert torch.get_num_threads() == 1  # forks have none of the threads of their parent
