"""The road of a command through the code: which files, functions and lines of the package one run enters.

    python bench/road.py                                  # the checkout that holds this file
    python bench/road.py --checkout ../other --json road.json

Runs `secateur prune --method wanda --pattern 50% --samples 8 --seq-len 128` on the demo model in this process and
traces every thread. Of each file stand there its lines, the functions that the run entered, the lines of these
functions from `def` to their end, and the lines that were executed. What an import runs, class bodies, decorators and
functions called by a module's body included, does not count. "Core" is what a newcomer has to read to follow Wanda from
the command to the bytes, the files of `CORE`; "rest" is what the run enters besides. A core file that the run does not
enter is listed with zeros.
"""

from __future__ import annotations

import ast
import runpy
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import CO_OPTIMIZED
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from common import options, save

COMMAND = ("prune", "--method", "wanda", "--pattern", "50%", "--samples", "8", "--seq-len", "128", "--out")
CORE = {
    "the program": ("prune.py", "pruning/prune.py"),
    "block by block": ("stream.py", "models/stream/blocks.py"),
    "what a block sees": ("gather.py", "watch.py", "models/stream/observe.py"),
    "one block": ("block.py", "pruning/block.py"),
    "the method": ("methods/wanda.py",),
    "what a method is": ("methods/base.py",),
    "which weights stay": ("patterns.py", "methods/patterns.py"),
    "the bytes": ("output.py", "place.py", "checkpoints/result.py"),
}
"""The road in its order, and where each part of it lies, or lay before the packages were made."""

Trace = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True)
class Entered:
    """What a run entered of one file."""

    file: str
    lines: int
    functions: tuple[str, ...]
    function_lines: int
    executed_lines: int


@contextmanager
def traced(package: Path) -> Iterator[dict[Path, set[int]]]:
    """Follow every thread; gives, by file, the lines of functions that ran, filled while the context is open."""
    lines: dict[Path, set[int]] = defaultdict(set)
    inside: dict[str, bool] = {}

    def enter(frame: FrameType, event: str, argument: Any) -> Trace | None:
        code = frame.f_code
        if code.co_filename not in inside:
            inside[code.co_filename] = Path(code.co_filename).is_relative_to(package)
        if not inside[code.co_filename] or not code.co_flags & CO_OPTIMIZED or _importing(frame, inside):
            return None
        reached = lines[Path(code.co_filename)]

        def step(frame: FrameType, event: str, argument: Any) -> Trace:
            if event == "line":
                reached.add(frame.f_lineno)
            return step

        return step

    threading.settrace(enter)
    sys.settrace(enter)
    try:
        yield lines
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def _importing(frame: FrameType | None, inside: dict[str, bool]) -> bool:
    """Whether the body of a module of the package, other than the program's own, is running further up."""
    while frame := frame and frame.f_back:
        if frame.f_code.co_name == "<module>" and inside.get(frame.f_code.co_filename):
            return frame.f_globals["__name__"] != "__main__"
    return False


def functions(body: list[ast.stmt], above: str = "") -> Iterator[tuple[str, range]]:
    """The functions and methods of a module by name, with their lines; one inside another belongs to it."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{above}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield above + node.name, range(node.lineno, (node.end_lineno or node.lineno) + 1)


def entered(package: Path, file: Path, executed: set[int]) -> Entered:
    """What the lines that ran in a file amount to."""
    text = file.read_text(encoding="utf-8")
    inside = {name: lines for name, lines in functions(ast.parse(text).body) if executed & set(lines)}
    place = file.relative_to(package).as_posix()
    return Entered(place, len(text.splitlines()), tuple(inside), sum(map(len, inside.values())), len(executed))


def road(checkout: Path) -> list[Entered]:
    """What the command enters in the package of a checkout, in the order of the files' names, core files at least."""
    source = checkout.resolve() / "src"
    package = source / "secateur"
    sys.path.insert(0, str(source))
    with TemporaryDirectory() as folder, traced(package) as lines:
        before, sys.argv = sys.argv, ["secateur", *COMMAND, f"{folder}/pruned"]
        try:
            runpy.run_module("secateur", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            sys.argv = before
    loaded = Path(sys.modules["secateur"].__file__ or "")
    if loaded.parent != package:
        sys.exit(f"The package that ran lies in {loaded.parent}; wanted was {package}. Set PYTHONPATH={source}.")
    expected = {package / place for places in CORE.values() for place in places}
    files = lines.keys() | {file for file in expected if file.exists()}
    return [entered(package, file, lines[file]) for file in sorted(files)]


def totals(files: list[Entered]) -> dict[str, int]:
    """How many files, and the sums over them."""
    return {
        "files": len(files),
        "lines": sum(each.lines for each in files),
        "functions": sum(len(each.functions) for each in files),
        "function_lines": sum(each.function_lines for each in files),
        "executed_lines": sum(each.executed_lines for each in files),
    }


def show(title: str, files: list[Entered], *, names: bool) -> None:
    """A table of files with their sums."""
    print(f"{title:32}{'lines':>8}{'functions':>12}{'their lines':>14}{'executed':>11}")
    for each in files:
        print(f"  {each.file:30}{each.lines:8}{len(each.functions):12}{each.function_lines:14}{each.executed_lines:11}")
        if names:
            print(f"      {', '.join(each.functions)}")
    count, *sums = totals(files).values()
    print(f"  {f'{count} files':30}{sums[0]:8}{sums[1]:12}{sums[2]:14}{sums[3]:11}\n")


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(checkout=(Path(__file__).parents[1], "default: this one")),
        dict(functions=(False, "name the functions too"), json=Path),
    )
    files = road(chosen.checkout)
    order = [place for places in CORE.values() for place in places]
    parts = {
        "core": sorted((each for each in files if each.file in order), key=lambda each: order.index(each.file)),
        "rest": [each for each in files if each.file not in order],
    }
    print(f"\nsecateur {' '.join(COMMAND)} …\n")
    for part, held in parts.items():
        show(part, held, names=chosen.functions)
    print(*(f"{value} {what.replace('_', ' ')}" for what, value in totals(files).items()), sep=", ")
    if chosen.json:
        sums = {part: totals(held) for part, held in {**parts, "all": files}.items()}
        document = {"command": COMMAND, "sums": sums, **{p: [asdict(e) for e in held] for p, held in parts.items()}}
        save(chosen.json, document)
