"""The house: which room may import which, how high it stands, and what a newcomer finds at its door."""

import ast
import inspect
from collections.abc import Iterator

import pytest
from support.imports import APART, KNOWN_TO_A_METHOD, MAY_IMPORT, SOURCE, imports, modules

import secateur

CALLED = [name for name in secateur.__all__ if inspect.isfunction(getattr(secateur, name))]
"""The public functions."""


def test_imports_keep_to_the_table():
    wrong = []
    for name, file in modules().items():
        room = name.split(".")[0]
        for other in imports(file):
            target = other.split(".")[0]
            if target != room and target not in MAY_IMPORT[room]:
                wrong.append(f"{name} imports {other}: {room} may import {', '.join(MAY_IMPORT[room]) or 'nothing'}")
            for pair in APART:
                for one, two in (pair, pair[::-1]):
                    if name.startswith(one) and other.startswith(two):
                        wrong.append(f"{name} imports {other}: {one} and {two} do not import each other")
    assert wrong == []


def test_the_table_has_no_circle_and_at_most_nine_floors():
    """A room stands one floor above the highest that it may import."""
    floors: dict[str, int] = {"secateur": 0}
    for room, others in MAY_IMPORT.items():  # in the order of the table, which a circle would break
        floors[room] = 1 + max((floors[other] for other in others), default=0)
    assert max(floors.values()) <= 9


def test_modules_import_each_other_in_no_circle():
    known = modules()
    graph = {
        name: {other for other in imports(file) if other in known and other != name} for name, file in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_package_has_twelve_rooms():
    entries = {path.stem for path in SOURCE.iterdir() if not path.name.startswith(("_", "."))}
    assert entries == MAY_IMPORT.keys()
    assert len(entries) <= 12


PARTS = {"__init__", "column_sweep", "cost", "keep_zeros", "least_squares", "pattern_text", "patterns", "statistics"}
PARTS |= {"rounding", "structures", "together", "values"}
"""Files of `methods` that methods are made of; every other one is a method, or the methods' base."""
PAPERS = [file for file in sorted((SOURCE / "methods").glob("*.py")) if file.stem not in PARTS]


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_method_knows_only_patterns_statistics_and_solvers(file):
    assert set(imports(file)) <= KNOWN_TO_A_METHOD


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package with the module that it stands in."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def test_no_function_takes_more_than_seven_parameters():
    """But the public ones, which have flat keywords, and the kernels', which have C's."""
    many = []
    for module, function in functions():
        arguments = function.args
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if len(set(names) - {"self", "cls"}) > 7 and module.split(".")[0] != "kernels":
            many.append(f"{module}.{function.name}")
    public = {f"{getattr(secateur, name).__module__.removeprefix('secateur.')}.{name}" for name in CALLED}
    assert set(many) <= public


def test_no_function_is_longer_than_sixty_lines():
    sizes = {f"{module}.{one.name}": (one.end_lineno or 0) - one.lineno + 1 for module, one in functions()}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_the_formatter_is_switched_off_nowhere_and_lines_are_short():
    lines = ((name, line) for name, file in modules().items() for line in file.read_text("utf-8").splitlines())
    assert [(name, line) for name, line in lines if "fmt: skip" in line or "fmt: off" in line] == []


def test_every_room_says_what_it_is():
    rooms = [file for file in modules().values() if file.stem == "__init__"]
    assert [file for file in rooms if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))] == []


def test_public_names_are_sorted_and_documented():
    assert secateur.__all__ == sorted(secateur.__all__)
    undocumented = [name for name in secateur.__all__ if not getattr(secateur, name).__doc__]
    assert undocumented == []
