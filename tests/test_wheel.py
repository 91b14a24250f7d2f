"""What is published: a wheel, installed with what it says that it needs and nothing else, runs the demo."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PathDistribution, distribution, requires
from pathlib import Path
from sysconfig import get_platform

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT

CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def needed(texts: Iterable[str] | None, already: set[str]) -> set[str]:
    """What the requirements name, and what that needs in turn, without any extra, beside what was known `already`."""
    for requirement in map(Requirement, texts or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = canonicalize_name(requirement.name)
            if name not in already:
                already.add(name)
                needed(requires(name), already)
    return already


def link(name: str, packages: Path) -> None:
    """Put a distribution that is installed here into another folder of packages, as symbolic links."""
    files = distribution(name).files
    assert files, f"{name} does not say what it consists of"
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        if not (packages / top).exists():
            (packages / top).symlink_to(str(distribution(name).locate_file(top)))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel and, of what is installed here, what the wheel says
    that it needs: nothing is downloaded, and what an extra brings is not there."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    compiled = place / f"source/build/lib.{get_platform()}-{sys.implementation.cache_tag}/secateur/kernels"
    compiled.mkdir(parents=True)
    for library in (ROOT / "src" / "secateur" / "kernels").glob("*.so"):
        shutil.copy2(library, compiled)  # compiled anew, for 20 s, where a source is newer
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place / "made", source, cwd=place)
    (wheel,) = (place / "made").glob("secateur-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "env", cwd=place)
    programs = place / "env" / "bin"
    run(*pip, "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    (packages,) = place.glob("env/lib/python*/site-packages")
    (information,) = packages.glob("secateur-*.dist-info")
    for name in needed(PathDistribution(information).requires, set()):
        link(name, packages)
    return programs


def test_a_wheel_runs_the_demo(installed: Path, tmp_path: Path):
    run(sys.executable, "-m", "pip", "--python", installed / "python", "check", cwd=tmp_path)
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
