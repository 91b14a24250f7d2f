"""Finished rows of a comparison on disk, so that the same command again computes only what is missing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from secateur.errors import ConditionsDiffer
from secateur.evaluate import Measured
from secateur.files import fits, read_json
from secateur.results import Row

CHECKPOINTS = "checkpoints"
"""Where the pruned checkpoints of a comparison lie, each under the name of its row's file."""
MOST_LOSS = 700.0
"""Nats a token; the perplexity of more is no number."""


class _Held(NamedTuple):
    """What the file of a row holds."""

    conditions: dict[str, Any]
    row: Row
    loss: list[float]


class RowStore:
    """Finished rows on disk, a file each, with the conditions they were measured under and the loss per window."""

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.folder, self.conditions = folder, conditions

    def check(self) -> None:
        """Raise ConditionsDiffer where a row here was measured under other conditions, naming the difference."""
        for file in sorted(self.folder.glob("*.json")):
            found = self._read(file).conditions
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
        if held.row.name != name or len(held.loss) != self.conditions["evaluation"]["samples"]:
            raise ConditionsDiffer(f"{file} is no row {name!r} over the windows at hand. Delete it and run again.")
        if held.row.checkpoint and not (self.folder.parent / held.row.checkpoint).is_dir():
            return None
        return held.row, Measured(np.asarray(held.loss))

    def put(self, row: Row, measured: Measured) -> None:
        """Keep a finished row."""
        held = {"conditions": self.conditions, "row": asdict(row), "loss": measured.loss.tolist()}
        write_whole(self.folder / f"{file_name(row.name)}.json", json.dumps(held, allow_nan=False))

    def _read(self, file: Path) -> _Held:
        """The row in a file. Whoever wrote it, it names no checkpoint but its own: that folder may be replaced."""
        try:
            held, hints = read_json(file, finite=True), get_type_hints(Row)
            if not fits(held, dict[str, Any]) or not held.keys() >= {"conditions", "row", "loss"}:
                raise ValueError("fields are missing")
            if not fits(held["conditions"], dict[str, Any]) or not fits(held["loss"], list[float]):
                raise ValueError("its conditions or losses are of another type")
            row = held["row"]
            if not isinstance(row, dict) or any(not fits(row[name], hints.get(name, None)) for name in row):
                raise ValueError("a field of the row is of another type")
            if row.get("checkpoint") not in (None, f"{CHECKPOINTS}/{file.stem}"):
                raise ValueError("its checkpoint lies elsewhere")
            if not all(0 <= loss < MOST_LOSS for loss in held["loss"]):
                raise ValueError("it has losses that no model has")
            row = Row(**{**row, "delta_interval": tuple(row["delta_interval"]), "rank": "", "ties": [], "latency": []})
        except (ValueError, TypeError, KeyError) as error:
            raise ConditionsDiffer(f"{file} is no finished row ({error}). Delete it and run again.") from error
        return _Held(held["conditions"], row, held["loss"])


def file_name(row: str) -> str:
    """A row's name as files have it."""
    return row.replace("%", "pct").replace(":", "of").replace(" ", "-")


def write_whole(file: Path, text: str) -> None:
    """Write beside and rename, so that a file is whole or absent."""
    part = file.with_name(f".{file.name}.partial")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
