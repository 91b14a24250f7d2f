"""Finished rows of a comparison on disk, so that the same command again computes only what is
missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConditionsDiffer
from secateur.evaluation.results.schema import Row
from secateur.system.files import write_whole
from secateur.system.json_files import read_json
from secateur.system.typed import read_as

CHECKPOINTS = "checkpoints"
"""Where the pruned checkpoints of a comparison lie, each under the name of its row's file."""


@dataclass(frozen=True)
class Kept:
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
            kept = self._read(file)
            for key in sorted(kept.conditions.keys() | self.conditions.keys()):
                self._same(file, key, kept.conditions.get(key), self.conditions.get(key))
            if kept.calibration is not None and kept.calibration not in self.draws:
                self._same(file, "calibration", kept.calibration, self.draws[0])

    def get(self, name: str, draw: int | None, label: str = "") -> Row | None:
        """A finished row by its name and draw, or None: also where its checkpoint is gone."""
        file = self._file(name, label)
        if not file.exists():
            return None
        kept = self._read(file)
        if kept.row.name != name or len(kept.row.loss) != self.conditions["evaluation"]["samples"]:
            raise ConditionsDiffer(
                f"{file} is no row {name!r} over the windows at hand. Delete it and run again."
            )
        self._same(
            file, "calibration", kept.calibration, None if draw is None else self.draws[draw]
        )
        if (
            kept.row.checkpoint
            and not (self.folder.parent / kept.row.checkpoint / "config.json").is_file()
        ):
            return None
        kept.row.calibration = draw
        return kept.row

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
                f"{file} was measured with {what} {found}, now it is {wanted}. Rows of different "
                "conditions do not go into one table: choose another --out, or delete all of that "
                "one."
            )

    def _read(self, file: Path) -> Kept:
        """The row in a file. Whoever wrote it, it names no checkpoint but its own: that folder may
        be replaced.
        """
        try:
            kept = read_as(Kept, read_json(file, finite=True))
            if kept.row.checkpoint not in (None, f"{CHECKPOINTS}/{file.stem}"):
                raise ValueError("its checkpoint lies elsewhere")
        except (ValueError, OSError) as error:
            raise ConditionsDiffer(
                f"{file} is no finished row ({error}). Delete it and run again."
            ) from error
        kept.row.rank, kept.row.ties, kept.row.latency, kept.row.tasks = "", [], [], {}
        return kept


def file_name(row: str) -> str:
    """A row's name as files have it."""
    return row.replace("%", "pct").replace(":", "of").replace(" ", "-")
