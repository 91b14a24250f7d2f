"""Imports point one way, public names are sorted and documented, files stay small."""

import pytest
from support.imports import KNOWN_TO_A_METHOD, LEVEL, SOURCE, SPLIT, imported

import secateur


@pytest.mark.parametrize(
    "name", [name for name in LEVEL if name not in ("methods", "demo", "runtimes", "formats", "kernels")]
)
def test_imports_point_one_way(name):
    for other in imported(SOURCE / f"{name.replace('.', '/')}.py"):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("file", sorted((SOURCE / "methods").glob("*.py")), ids=lambda file: file.stem)
def test_a_method_knows_only_patterns_statistics_and_solvers(file):
    assert imported(file) <= KNOWN_TO_A_METHOD


def test_every_module_is_placed():
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    inside = {f"{package}.{path.stem}" for package in SPLIT for path in (SOURCE / package).glob("[!_]*.py")}
    assert (modules - set(SPLIT)) | inside == LEVEL.keys()


def test_public_names_are_sorted_and_documented():
    assert secateur.__all__ == sorted(secateur.__all__)
    undocumented = [name for name in secateur.__all__ if not getattr(secateur, name).__doc__]
    assert undocumented == []


def test_files_stay_readable():
    long = {str(f.name): n for f in SOURCE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 350}
    assert long == {}
