"""Finished rows on disk, so that the same command again computes only what is missing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoints.journal import Finished
from secateur.errors import ConditionsDiffer
from secateur.evaluation.results.schema import Row

ROWS, CHECKPOINTS, TASKS = "rows", "checkpoints", "tasks"
"""The folders of a comparison: a file for each row, its pruned checkpoint by the same name, a file
for what it answers on each task.
"""


@dataclass(frozen=True)
class FinishedRow(Finished):
    """What the file of a row holds; `calibration` is the text it was calibrated on."""

    calibration: dict[str, Any] | None
    row: Row


class RowStore:
    """Finished rows on disk, a file each, with the conditions and the calibration text they were
    measured under.

    `draws` are the calibration texts that rows may have here, as `Windows.fingerprint` gives them.
    """

    def __init__(
        self, folder: Path, conditions: dict[str, Any], draws: Sequence[dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.conditions: dict[str, Any] = json.loads(json.dumps(conditions))
        self.draws: list[dict[str, Any]] = json.loads(json.dumps(draws))

    def check(self) -> None:
        """Raise ConditionsDiffer where a row was measured under other conditions, and name them."""
        for file in sorted(self.folder.glob("*.json")):
            kept = _read(file)
            for key in sorted(kept.conditions.keys() | self.conditions.keys()):
                _same(file, key, kept.conditions.get(key), self.conditions.get(key))
            if kept.calibration is not None and kept.calibration not in self.draws:
                _same(file, "calibration", kept.calibration, self.draws[0])

    def get(self, name: str, draw: int | None, label: str = "") -> Row | None:
        """A finished row by its name and draw, or None: also where its checkpoint is gone."""
        file = self._file(name, label)
        if not file.exists():
            return None
        kept = _read(file)
        row, wanted = kept.row, None if draw is None else self.draws[draw]
        if row.name != name or len(row.loss) != self.conditions["evaluation"]["samples"]:
            raise ConditionsDiffer(
                f"{file} is no row {name!r} over the windows at hand. Delete it and run again."
            )
        _same(file, "calibration", kept.calibration, wanted)
        if row.checkpoint and not (self.folder.parent / row.checkpoint / "config.json").is_file():
            return None
        row.calibration = draw
        return row

    def put(self, row: Row, label: str = "") -> None:
        """Keep a finished row."""
        calibration = None if row.calibration is None else self.draws[row.calibration]
        FinishedRow(self.conditions, calibration, row).write(self._file(row.name, label))

    def _file(self, name: str, label: str) -> Path:
        return self.folder / f"{file_name(name + label)}.json"


def recorded_condition(out: Path, condition: str) -> Any:
    """What the rows in `out` were measured with, where there are any; None otherwise."""
    file = min((out / ROWS).glob("*.json"), default=None)
    return None if file is None else _read(file).conditions.get(condition)


def file_name(row: str) -> str:
    """A row's name as files have it."""
    return row.replace("%", "pct").replace(":", "of").replace(" ", "-")


def _read(file: Path) -> FinishedRow:
    """The row in a file; it names no checkpoint but its own, since that may be replaced."""
    try:
        kept = FinishedRow.read(file)
        if kept.row.checkpoint not in (None, f"{CHECKPOINTS}/{file.stem}"):
            raise ValueError("its checkpoint lies elsewhere")
    except (ValueError, OSError) as error:
        raise ConditionsDiffer(
            f"{file} is no finished row ({error}). Delete it and run again."
        ) from error
    kept.row.rank, kept.row.ties, kept.row.latency, kept.row.tasks = "", [], [], {}
    return kept


def _same(file: Path, what: str, before: Any, now: Any) -> None:
    if before != now:
        raise ConditionsDiffer(
            f"{file} was measured with {what} {before}, now it is {now}. Rows of different "
            "conditions do not go into one table: choose another --out, or delete all of that one."
        )
