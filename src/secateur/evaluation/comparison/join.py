"""Several comparisons as one, where they were made under the same conditions; else the difference
is named.
"""

from __future__ import annotations

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
"""What must be equal, besides the model's files and the first calibration text, which is that of
the table.
"""


def report(results: Sequence[str | Path], *, out: str | Path) -> Results:
    """Write `report.html`, `report.md` and `results.json` of comparisons joined to `out`; returns
    the whole.

    `results` are files or the folders that hold them. Raises BadResults; ConditionsDiffer where two
    were made with another model, text, metric, options or versions, or timed on another machine.
    """
    if not results:
        raise BadResults("At least one results.json was wanted; found none.")
    files = [Path(name) for name in results]
    found = [read_results(file) for file in files]
    for file, one in zip(files, found, strict=True):
        if len(found) > 1 and (bare := [row.name for row in one.rows if not row.loss]):
            raise BadResults(
                f"{file} has no loss of {bare[0]!r}, so it cannot be ranked anew. Run it again."
            )
    out = Path(out)
    for file, one in zip(files, found, strict=True):
        folder = file if file.is_dir() else file.parent
        for row in one.rows:
            row.checkpoint = row.checkpoint and os.path.relpath(folder / row.checkpoint, out)
    joined = found[0]
    for file, other in zip(files[1:], found[1:], strict=True):
        joined = join(joined, other, str(files[0]), str(file))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", joined.json())
        write_report(joined, out)
    return joined


def join(one: Results, other: Results, name: str, other_name: str) -> Results:
    """The rows of both, ranked anew. Raises ConditionsDiffer, which names what differs between the
    two files.
    """
    _same("model", {**one.model, "name": ""}, {**other.model, "name": ""}, name, other_name)
    for key in SAME:
        _same(key, getattr(one, key), getattr(other, key), name, other_name)
    _same("calibration", one.calibrations[0], other.calibrations[0], name, other_name)
    if any(row.latency for row in one.rows) and any(row.latency for row in other.rows):
        _same("machine", one.machine, other.machine, name, other_name)
    if one.dense.tasks and other.dense.tasks:
        _same(
            "tasks",
            ", ".join(sorted(one.dense.tasks)),
            ", ".join(sorted(other.dense.tasks)),
            name,
            other_name,
        )
    for task in one.dense.tasks.keys() & other.dense.tasks.keys() - {"mean"}:
        items, others = (found.dense.tasks[task]["items"] for found in (one, other))
        _same(f"the items of {task}", items, others, name, other_name)
    calibrations = [
        *one.calibrations,
        *(draw for draw in other.calibrations if draw not in one.calibrations),
    ]
    places = [calibrations.index(draw) for draw in other.calibrations]
    rows = {(row.name, row.calibration): row for row in one.rows}
    for row in other.rows:
        moved = replace(
            row, calibration=None if row.calibration is None else places[row.calibration]
        )
        held = rows.setdefault((moved.name, moved.calibration), moved)
        if held is not moved:
            _same(f"the row {row.name}", held.loss, row.loss, name, other_name)
            rows[moved.name, moved.calibration] = _fuller(held, moved)
    joined = replace(
        one,
        calibrations=calibrations,
        rows=list(rows.values()),
        machine=one.machine if any(row.latency for row in one.rows) else other.machine,
        command=[*one.command, "&&", *other.command],
        not_timed=one.not_timed | other.not_timed,
        tolerance=_tolerance(one, other, name, other_name),
    )
    rank([row for row in joined.rows if not row.searched])
    return joined


def _fuller(one: Row, other: Row) -> Row:
    """The same row in two comparisons: with what either has measured besides, and in the table if
    it is in one.
    """
    return replace(
        one,
        latency=one.latency or other.latency,
        tasks=one.tasks or other.tasks,
        searched=one.searched and other.searched,
    )


def _tolerance(one: Results, other: Results, name: str, other_name: str) -> dict[str, Any]:
    if not one.tolerance or not other.tolerance:
        return one.tolerance or other.tolerance
    _same("tolerance", one.tolerance["share"], other.tolerance["share"], name, other_name)
    more = [reach for reach in other.tolerance["found"] if reach not in one.tolerance["found"]]
    return {**one.tolerance, "found": [*one.tolerance["found"], *more]}


def _same(what: str, one: Any, other: Any, name: str, other_name: str) -> None:
    if one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        what, one, other = f"{what} {key}", one.get(key), other.get(key)
    shown = "" if isinstance(one, list) else f": {one} and {other}"
    raise ConditionsDiffer(
        f"{name} and {other_name} differ in {what}{shown}. Rows of different conditions do not go "
        "into one table: run both comparisons alike, or write a report of each."
    )
