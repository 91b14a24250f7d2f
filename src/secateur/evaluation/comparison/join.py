"""Several comparisons as one, where they were made under the same conditions; else the difference
is named.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import BadResults, ConditionsDiffer
from secateur.evaluation.report.write import write_report
from secateur.evaluation.results.ranking import rank
from secateur.evaluation.results.schema import Results, Row, read_results
from secateur.system.files import disk_errors, write_whole

SAME = ("evaluation", "options", "versions")
"""What must be equal, besides the model's files and the calibration text of the table."""


def report(results: Sequence[str | Path], *, out: str | Path) -> Results:
    """Write `report.html`, `report.md` and `results.json` of comparisons joined to `out`; returns
    the whole.

    `results` are files or the folders that hold them. Raises BadResults; ConditionsDiffer where two
    were made with another model, text, metric, options or versions, or timed on another machine.
    """
    if not results:
        raise BadResults("At least one results.json was wanted; found none.")
    files, out = [Path(name) for name in results], Path(out)
    comparisons = [read_results(file) for file in files]
    for file, one in zip(files, comparisons, strict=True):
        folder = file if file.is_dir() else file.parent
        for row in one.rows:
            if len(files) > 1 and not row.loss:
                lacks = f"{file} has no loss of {row.name!r}"
                raise BadResults(f"{lacks}, so it cannot be ranked anew. Run it again.")
            row.checkpoint = row.checkpoint and os.path.relpath(folder / row.checkpoint, out)
    joined = comparisons[0]
    for file, other in zip(files[1:], comparisons[1:], strict=True):
        joined = join(joined, other, str(files[0]), str(file))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", joined.json())
        write_report(joined, out)
    return joined


def join(one: Results, other: Results, name: str, other_name: str) -> Results:
    """The rows of both, ranked anew. Raises ConditionsDiffer, which names what differs."""

    def same(what: str, value: Any, other_value: Any) -> None:
        _same(what, value, other_value, f"{name} and {other_name}")

    same("model", {**one.model, "name": ""}, {**other.model, "name": ""})
    for key in SAME:
        same(key, getattr(one, key), getattr(other, key))
    same("calibration", one.calibrations[0], other.calibrations[0])
    timed = any(row.latency for row in one.rows)
    if timed and any(row.latency for row in other.rows):
        same("machine", one.machine, other.machine)
    if one.dense.tasks and other.dense.tasks:
        same("tasks", *(", ".join(sorted(each.dense.tasks)) for each in (one, other)))
    for task in one.dense.tasks.keys() & other.dense.tasks.keys() - {"mean"}:
        same(f"the items of {task}", *(each.dense.tasks[task]["items"] for each in (one, other)))
    tolerance = one.tolerance or other.tolerance
    if one.tolerance and other.tolerance:
        same("tolerance", one.tolerance["share"], other.tolerance["share"])
        reached = [*one.tolerance["found"], *other.tolerance["found"]]
        unique = [reach for number, reach in enumerate(reached) if reach not in reached[:number]]
        tolerance = {**one.tolerance, "found": unique}
    calibrations = [
        *one.calibrations,
        *(draw for draw in other.calibrations if draw not in one.calibrations),
    ]
    numbers: dict[int | None, int] = {
        number: calibrations.index(draw) for number, draw in enumerate(other.calibrations)
    }
    rows = {(row.name, row.calibration): row for row in one.rows}
    for row in other.rows:
        moved = replace(row, calibration=numbers.get(row.calibration))
        key = moved.name, moved.calibration
        if key in rows:
            same(f"the row {row.name}", rows[key].loss, row.loss)
            moved = _fuller(rows[key], moved)
        rows[key] = moved
    joined = replace(
        one,
        calibrations=calibrations,
        rows=list(rows.values()),
        machine=one.machine if timed else other.machine,
        command=[*one.command, "&&", *other.command],
        not_timed=one.not_timed | other.not_timed,
        notes=[*dict.fromkeys([*one.notes, *other.notes])],
        tolerance=tolerance,
    )
    rank([row for row in joined.rows if not row.searched])
    return joined


def _fuller(one: Row, other: Row) -> Row:
    """The row of two comparisons, with what either measured; in the table if it is in one's."""
    return replace(
        one,
        latency=one.latency or other.latency,
        tasks=one.tasks or other.tasks,
        searched=one.searched and other.searched,
    )


def _same(what: str, one: Any, other: Any, names: str) -> None:
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        what, one, other = f"{what} {key}", one.get(key), other.get(key)
    shown = "" if isinstance(one, list) else f": {one} and {other}"
    raise ConditionsDiffer(
        f"{names} differ in {what}{shown}. Rows of different conditions do not go into one table: "
        "run both comparisons alike, or write a report of each."
    )
