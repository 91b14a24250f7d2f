"""Finished rows of a comparison on disk, so that the same command again computes only what is
missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from secateur.errors import ConditionsDiffer
from secateur.evaluation.results.schema import MOST_LOSS, Row, read_row
from secateur.system.files import write_whole
from secateur.system.json_files import fits, read_json

CHECKPOINTS = "checkpoints"
"""Where the pruned checkpoints of a comparison lie, each under the name of its row's file."""


class _Held(NamedTuple):
    """What the file of a row holds."""

    conditions: dict[str, Any]
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

    def recorded(self, condition: str) -> Any:
        """What the rows here were measured with, where there are any; None otherwise."""
        return next(
            (
                self._read(file).conditions.get(condition)
                for file in sorted(self.folder.glob("*.json"))
            ),
            None,
        )

    def check(self) -> None:
        """Raise ConditionsDiffer where a row here was measured under other conditions, naming the
        difference.
        """
        for file in sorted(self.folder.glob("*.json")):
            held = self._read(file)
            for key in sorted(held.conditions.keys() | self.conditions.keys()):
                self._same(file, key, held.conditions.get(key), self.conditions.get(key))
            if held.calibration is not None and held.calibration not in self.draws:
                self._same(file, "calibration", held.calibration, self.draws[0])

    def get(self, name: str, draw: int | None, label: str = "") -> Row | None:
        """A finished row by its name and draw, or None: also where its checkpoint is gone."""
        file = self._file(name, label)
        if not file.exists():
            return None
        held = self._read(file)
        if held.row.name != name or len(held.row.loss) != self.conditions["evaluation"]["samples"]:
            raise ConditionsDiffer(
                f"{file} is no row {name!r} over the windows at hand. Delete it and run again."
            )
        self._same(
            file, "calibration", held.calibration, None if draw is None else self.draws[draw]
        )
        if (
            held.row.checkpoint
            and not (self.folder.parent / held.row.checkpoint / "config.json").is_file()
        ):
            return None
        held.row.calibration = draw
        return held.row

    def put(self, row: Row, label: str = "") -> None:
        """Keep a finished row."""
        calibration = None if row.calibration is None else self.draws[row.calibration]
        held = {"conditions": self.conditions, "calibration": calibration, "row": asdict(row)}
        write_whole(self._file(row.name, label), json.dumps(held, allow_nan=False))

    def _file(self, name: str, label: str) -> Path:
        return self.folder / f"{file_name(name + label)}.json"

    def _same(self, file: Path, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise ConditionsDiffer(
                f"{file} was measured with {what} {found}, now it is {wanted}. Rows of different conditions do not go "
                "into one table: choose another --out, or delete all of that one."
            )

    def _read(self, file: Path) -> _Held:
        """The row in a file. Whoever wrote it, it names no checkpoint but its own: that folder may
        be replaced.
        """
        try:
            held = read_json(file, finite=True)
            if not fits(held, dict[str, Any]) or not held.keys() >= {
                "conditions",
                "calibration",
                "row",
            }:
                raise ValueError("fields are missing")
            if not fits(held["conditions"], dict[str, Any]) or not fits(
                held["calibration"], dict[str, Any] | None
            ):
                raise ValueError("its conditions or its calibration are of another type")
            row = read_row(held["row"], "its row")
            if row.checkpoint not in (None, f"{CHECKPOINTS}/{file.stem}"):
                raise ValueError("its checkpoint lies elsewhere")
            if not all(0 <= loss < MOST_LOSS for loss in row.loss):
                raise ValueError("it has losses that no model has")
        except (ValueError, OSError) as error:
            raise ConditionsDiffer(
                f"{file} is no finished row ({error}). Delete it and run again."
            ) from error
        row.rank, row.ties, row.latency, row.tasks = "", [], [], {}
        return _Held(held["conditions"], held["calibration"], row)


def file_name(row: str) -> str:
    """A row's name as files have it."""
    return row.replace("%", "pct").replace(":", "of").replace(" ", "-")
