"""What is published: a wheel, installed with its dependencies where there is nothing else, runs the demo."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of programs of an environment that holds the wheel and what it needs, at the versions of CI."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", place / "made", source, cwd=place)
    (wheel,) = (place / "made").glob("secateur-*.whl")
    run(sys.executable, "-m", "venv", place / "env", cwd=place)
    programs = place / "env" / "bin"
    run(programs / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=place)
    shutil.rmtree(source)
    yield programs
    shutil.rmtree(place)  # 1.7 GB


def test_a_wheel_runs_the_demo(installed: Path, tmp_path: Path):
    run(installed / "pip", "check", cwd=tmp_path)
    small = ("--windows", 4, "--samples", 4, "--seq-len", 64, "--quiet")
    shown = run(
        installed / "secateur", "compare", "--methods", "wanda,energy", "--patterns", "2:4,25% of channels", *small,
        "--out", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert "semi-structured" in shown
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["dense", "semi-structured", "structured"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    advice = run(installed / "secateur", "recommend", tmp_path / "out", "--goal", "portability", cwd=tmp_path)
    assert "channels" in advice
    assert run(installed / "secateur", "--version", cwd=tmp_path).strip()
    assert "packed products:" in run(installed / "secateur", "doctor", cwd=tmp_path)


def test_what_an_extra_brings_is_named_where_it_is_missing(installed: Path, tmp_path: Path):
    done = subprocess.run(
        [str(installed / "secateur"), "evaluate", "--tasks", "boolq"], cwd=tmp_path, env=CLEAN, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'secateur[tasks]'" in done.stderr
