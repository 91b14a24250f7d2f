"""What the package looks like as a whole: lines, files, rooms, floors, long functions, long lines. Reads, runs nothing.

    python bench/house.py                                 # the checkout that holds this file
    python bench/house.py --checkout ../other --names     # with the names of what is counted

A floor of a room (a folder or file at the top of `src/secateur`) is one more than that of the highest room it imports
from, by any import statement, inside functions too; rooms that import each other in a circle share one floor. Entries
leave out what is built, hidden, or, as `__init__.py`, the package's own. A function is private where `__init__.py` does
not name it; parameters count without `self` and `cls`, and those of kernels are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import options, save

COLUMNS, FUNCTION_LINES, PARAMETERS = 100, 60, 7


@dataclass(frozen=True)
class Source:
    """One file of the package: where it lies below `src/secateur`, its lines and its syntax tree."""

    place: Path
    lines: list[str]
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.place.parts[0].removesuffix(".py")


def sources(package: Path) -> list[Source]:
    """Every Python file of the package."""
    texts = ((file, file.read_text(encoding="utf-8")) for file in sorted(package.rglob("*.py")))
    return [Source(file.relative_to(package), text.splitlines(), ast.parse(text)) for file, text in texts]


def imported(source: Source, rooms: set[str]) -> set[str]:
    """The rooms that a file imports from, other than its own."""
    found = set()
    for node in ast.walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["secateur", *source.place.parts[: len(source.place.parts) - node.level]] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for top, *parts in (name.split(".") for name in names):
            if top == "secateur":
                found.add(parts[0] if parts and parts[0] in rooms else "__init__")
    return found - {source.room}


def circles(graph: dict[str, set[str]]) -> dict[str, frozenset[str]]:
    """For each room, those that it reaches and that reach it, itself included."""
    reached = {room: set(others) for room, others in graph.items()}
    for middle in graph:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return {room: frozenset({room} | {r for r in reached[room] if room in reached[r]}) for room in graph}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, 1 for those that import nothing."""
    circle, floor = circles(graph), dict[str, int]()

    def climb(room: str) -> int:
        if room not in floor:
            below = {other for member in circle[room] for other in graph[member]} - circle[room]
            floor[room] = 1 + max(map(climb, below), default=0)
        return floor[room]

    return {room: climb(room) for room in graph}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg) if a]
    return len([name for name in names if name not in ("self", "cls")])


def offered(face: Source) -> set[str]:
    """The names that `secateur/__init__.py` writes in quotes, in `__all__` or in a table of what it imports later."""
    return {
        node.value for node in ast.walk(face.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def house(package: Path) -> dict[str, list[str]]:
    """By what is counted: the names of all that count, one each."""
    files = sources(package)
    rooms = {source.room for source in files}
    graph: dict[str, set[str]] = {room: set() for room in rooms}
    for source in files:
        graph[source.room] |= imported(source, rooms)
    face = next(source for source in files if source.place == Path("__init__.py"))
    floor, public = floors(graph), offered(face)
    entries = [e.name for e in package.iterdir() if e.suffix != ".so" and not e.name.startswith(("_", "."))]
    each = [(source, function) for source in files for function in functions(source.tree)]
    long = [(s, f) for s, f in each if (f.end_lineno or 0) - f.lineno + 1 > FUNCTION_LINES]
    many = [(s, f) for s, f in each if parameters(f) > PARAMETERS and s.room != "kernels"]
    numbered = [(s, number, line) for s in files for number, line in enumerate(s.lines, 1)]
    highest = max(floor.values())
    return {
        "lines of Python": [f"{s.place}:{number}" for s, number, _ in numbered],
        "files": [str(s.place) for s in files],
        "entries at the top of src/secateur": sorted(entries),
        "floors": [", ".join(sorted(r for r in floor if floor[r] == n)) for n in range(1, highest + 1)],
        "circles of rooms": [", ".join(sorted(c)) for c in set(circles(graph).values()) if len(c) > 1],
        "fmt: skip": [f"{s.place}:{number}" for s, number, line in numbered if "# fmt: skip" in line],
        f"functions over {FUNCTION_LINES} lines": [f"{s.place}: {f.name}" for s, f in long],
        f"functions with more than {PARAMETERS} parameters": [f"{s.place}: {f.name} {parameters(f)}" for s, f in many],
        "of these, private": [f"{s.place}: {f.name} {parameters(f)}" for s, f in many if f.name not in public],
        f"lines over {COLUMNS} columns": [f"{s.place}:{n}" for s, n, line in numbered if len(line) > COLUMNS],
    }


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(checkout=(Path(__file__).parents[1], "default: this one")),
        dict(names=(False, "name what is counted, lines and files aside"), json=Path),
    )
    counted = house(chosen.checkout / "src" / "secateur")
    for what, names in counted.items():
        print(f"{what:48}{len(names):8}")
        for name in names if chosen.names and what not in ("lines of Python", "files") else ():
            print(f"    {name}")
    if chosen.json:
        save(chosen.json, {what: len(names) for what, names in counted.items()})
