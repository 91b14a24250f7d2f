"""Several processes on one run: the masks of one, and what happens when one of them dies."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forks import in_ranks
from support.paths import SUPPORT

from secateur.models.stream.distributed import ALONE


def prune(
    model: Path, out: Path, text: Path, ranks: int, *more: str, fail: str = "", fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """`fresh`: as a user starts it, in processes that begin with nothing."""
    words = [
        "prune", str(model), "--out", str(out), "--calibration", str(text), "--samples", "7", "--seq-len", "24",
        "--batch-size", "2", "--quiet", *more,
    ]  # fmt: skip
    program = SUPPORT / "dying_rank.py" if fail else "secateur"
    environment = {"OMP_NUM_THREADS": "1", "DIE_AT": fail}
    patience = 1.0 if fail else 0.1
    return in_ranks(ranks, program, *words, fresh=fresh, patience=patience, environment=environment)


@pytest.mark.parametrize(("family", "method"), [("llama", "sweep+dense-target"), ("mixtral", "wanda")])
def test_two_ranks_give_the_masks_of_one(family, method, tiny_llama, tiny_mixtral, text_file, tmp_path):
    model = {"llama": tiny_llama, "mixtral": tiny_mixtral}[family]
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        done = prune(model, out, text_file, ranks, "--method", method)
        assert done.returncode == 0, done.stderr
        found.append(load_file(out / "model.safetensors"))
        record = json.loads((out / "pruning.json").read_text())
        assert record["sparsity"] == pytest.approx(0.5)
    one, two = found
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, two[name] == 0)
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_rank_that_dies_ends_the_run_and_another_number_goes_on(tiny_llama, text_file, tmp_path):
    done = prune(tiny_llama, tmp_path / "out", text_file, 2, "--method", "wanda", fail="1 model.layers.2")
    assert done.returncode != 0
    assert "Another process of this run has died" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.journal", ".out.partial"]
    assert (tmp_path / ".out.journal").read_text().count('["block"') == 2
    assert prune(tiny_llama, tmp_path / "out", text_file, 1, "--method", "wanda").returncode == 0
    assert prune(tiny_llama, tmp_path / "other", text_file, 1, "--method", "wanda").returncode == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one)


def test_an_error_is_said_once(tiny_llama, text_file, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = prune(broken, tmp_path / "out", text_file, 2, fresh=True)
    assert done.returncode != 0
    assert done.stderr.count("secateur: The weights of model.layers.1.mlp.down_proj hold NaN or Inf") == 1
    assert "Traceback (most recent call last)" not in done.stderr.partition("torch/distributed")[0]
    assert not (tmp_path / "out").exists()


def test_what_ranks_cannot_share_is_refused(tiny_llama, text_file, tmp_path):
    done = prune(tiny_llama, tmp_path / "out", text_file, 2, "--method", "wanda+refine")
    assert done.returncode != 0
    assert "which several processes do not share; found 2." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_alone():
    assert ALONE.first
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert ALONE.same(lambda: 5) == 5
    assert ALONE.together(lambda: 5) == [5]
    x = torch.ones(2)
    assert ALONE.hand_round(x, 0) is x
    assert ALONE.add({}) == {}
