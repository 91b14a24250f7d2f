"""Every script in examples/ runs, as a user runs it, and what it prints is what lies on the disk afterwards."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from safetensors.torch import load_file
from support import forks
from support.paths import ROOT

from secateur.data.demo import model_folder
from secateur.kernels.library import library

EXAMPLES = ROOT / "examples"
MATRIX = re.compile(r"layers\.\d+\..*_proj\.weight")


def run(name: str, out: Path, *options: str, start: Callable[..., CompletedProcess[str]] = forks.run) -> str:
    """What a script prints; warnings end it. `start`: subprocess.run, where nothing is to be imported already."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--out", str(out), *options]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = start(command, capture_output=True, text=True, env=quiet, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sparsity(folder: Path) -> float:
    """The share of zeros in the matrices of a checkpoint's blocks."""
    matrices = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if MATRIX.search(name)]
    return sum((m == 0).sum().item() for m in matrices) / sum(m.numel() for m in matrices)


def test_every_example_is_run_here_and_short():
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested
    assert [file.name for file in EXAMPLES.glob("*.py") if len(file.read_text().splitlines()) >= 40] == []


def test_a_pruned_model_loads_in_plain_transformers(tmp_path):
    options = ("--method", "wanda", "--pattern", "50% of row", "--samples", "2")
    said = run("reload", tmp_path / "out", *options, start=subprocess.run)
    assert "wanda 50% of row: 50.00% of the weights of 42 matrices" in said
    assert "as transformers has it: 50.00%" in said
    assert "def read(self, size):" in said
    assert sparsity(tmp_path / "out") == 0.5


def test_two_methods_are_compared(tmp_path):
    settings = ("--first", "magnitude", "--second", "wanda", "--samples", "2", "--windows", "4")
    said = run("compare", tmp_path, *settings, "--pattern", "2:4").splitlines()
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == [line.split()[0] for line in said] == ["dense", "magnitude", "wanda"]
    assert [f"{row['perplexity']:.3f}" for row in rows] == [line.split()[1] for line in said]


def test_a_smaller_model_is_smaller(tmp_path):
    said = run("smaller", tmp_path / "out", "--samples", "2", "--windows", "2", "--pattern", "50% of channels")
    counts = [
        sum(t.numel() for t in load_file(f / "model.safetensors").values()) for f in (model_folder(), tmp_path / "out")
    ]
    assert said.startswith(f"{counts[0]:,} parameters before, {counts[1]:,} after\n")
    assert "of the stock LlamaForCausalLM: 256" in said


@pytest.mark.skipif(library() is None, reason="the C library of the package was not compiled here")
def test_packed_layers_are_timed(tmp_path):
    said = run("packed", tmp_path / "out", "--samples", "2", "--rounds", "3")
    assert re.fullmatch(r"42 layers packed: \d+\.\d\d ms a token before, \d+\.\d\d ms after\n", said)
    assert sparsity(tmp_path / "out") == pytest.approx(0.7, abs=1e-4)


def test_a_plan_is_measured_and_used(tmp_path):
    said = run("plan", tmp_path, "--samples", "2").splitlines()
    sites = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["sites"]
    assert [line.split() for line in said[1:8]] == [[pattern, site] for site, pattern in list(sites.items())[:7]]
    assert said[-1] == "pruned to 70.00%"
    assert sparsity(tmp_path / "pruned") == pytest.approx(0.7, abs=1e-4)


def test_a_method_of_ones_own(tmp_path):
    said = run("own_method", tmp_path / "out", "--samples", "2").splitlines()
    assert [line.split()[0] for line in said] == ["wanda", "clipped", "clipped+refit"]
    errors = [float(line.split()[-1]) for line in said]
    assert errors[2] < errors[1]
    assert sparsity(tmp_path / "out") == 0.5
