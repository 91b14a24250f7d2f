"""Finished rows of a comparison on disk, so that the same command again computes only what is missing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import ConditionsDiffer
from secateur.evaluate import Measured
from secateur.results import Row


class RowStore:
    """Finished rows on disk, a file each, with the conditions they were measured under and the loss per window."""

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.folder, self.conditions = folder, conditions

    def check(self) -> None:
        """Raise ConditionsDiffer where a row here was measured under other conditions, naming the difference."""
        for file in sorted(self.folder.glob("*.json")):
            found = self._read(file)["conditions"]
            wanted = json.loads(json.dumps(self.conditions))
            for key in sorted(found.keys() | wanted.keys()):
                if found.get(key) != wanted.get(key):
                    raise ConditionsDiffer(
                        f"{file} was measured with {key} {found.get(key)}, now it is {wanted.get(key)}. Rows of "
                        "different conditions do not go into one table: choose another --out, or delete that folder."
                    )

    def get(self, name: str) -> tuple[Row, Measured] | None:
        """A finished row by its name, or None: also where its checkpoint is gone."""
        file = self.folder / f"{file_name(name)}.json"
        if not file.exists():
            return None
        held = self._read(file)
        row = Row(**held["row"])
        if row.checkpoint and not (self.folder.parent / row.checkpoint).is_dir():
            return None
        row.delta_interval = (row.delta_interval[0], row.delta_interval[1])
        return row, Measured(np.asarray(held["loss"]))

    def put(self, row: Row, measured: Measured) -> None:
        """Keep a finished row."""
        held = {"conditions": self.conditions, "row": asdict(row), "loss": measured.loss.tolist()}
        write_whole(self.folder / f"{file_name(row.name)}.json", json.dumps(held, allow_nan=False))

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if not held.keys() >= {"conditions", "row", "loss"}:
                raise ValueError("fields are missing")
        except (ValueError, AttributeError) as error:
            raise ConditionsDiffer(f"{file} is no finished row ({error}). Delete it and run again.") from error
        return held


def file_name(row: str) -> str:
    """A row's name as files have it."""
    return row.replace("%", "pct").replace(":", "of").replace(" ", "-")


def write_whole(file: Path, text: str) -> None:
    """Write beside and rename, so that a file is whole or absent."""
    part = file.with_name(f".{file.name}.partial")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
