"""What is kept of a training, so that the same command goes on where a killed one stopped.

A folder beside the result: the Trainer's checkpoints, of which those that were written to their end
are marked, and a journal with the conditions and the seconds so far, which is locked while a run is
going on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from secateur.checkpoints.journal import Journal, differences
from secateur.errors import ConditionsDiffer
from secateur.recovery.job import Job
from secateur.system.files import disk_errors, sync

WHOLE = "whole"
"""The file that says that a checkpoint is on disk with all it has."""
SECONDS = "seconds"


class TrainingState:
    """A training that is going on, to be used with `with`; of several processes the first writes.

    Where it ends without a checkpoint, nothing is kept. Raises OutputRefused where another run is
    going on there, ConditionsDiffer where a run that died had others; --restart discards that.
    """

    def __init__(self, job: Job) -> None:
        self.folder = job.out.resolve().with_name(f".{job.out.name}.recovery")
        self.ranks, self._started, self._before = job.ranks, job.started, 0.0
        self._journal: Journal | None = None
        job.ranks.same(lambda: self._begin(job.conditions, job.destination.restart))

    @property
    def seconds(self) -> float:
        """What it has taken so far, over all runs."""
        return self._before + perf_counter() - self._started

    def last(self) -> str | None:
        """The newest checkpoint that is whole."""
        whole = [place for place in self.folder.glob("checkpoint-*") if (place / WHOLE).is_file()]
        newest = max(whole, key=lambda place: int(place.name.rpartition("-")[2]), default=None)
        return str(newest) if newest else None

    def mark(self, step: int) -> None:
        """The checkpoint of a step is written; it is on disk, and says so, when this returns."""
        self.ranks.together(lambda: None)  # every process has written its part
        if self._journal is None:
            return
        checkpoint = self.folder / f"checkpoint-{step}"
        with disk_errors(self.folder):
            for file in checkpoint.rglob("*"):
                if file.is_file():
                    sync(file)
            self._journal.add(SECONDS, self.seconds)
            (checkpoint / WHOLE).touch()
            sync(checkpoint)

    def remove(self) -> None:
        """The result has its name: nothing is left to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> TrainingState:
        return self

    def __exit__(self, *error: object) -> None:
        if self._journal is None:
            return
        if self.last() is None:
            self.remove()
        elif self._journal.file.exists():
            self._journal.add(SECONDS, self.seconds)
        self._journal.close()

    def _begin(self, conditions: Mapping[str, Any], restart: bool) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = journal = Journal(self.folder / "journal")
        for place in self.folder.glob("checkpoint-*"):
            if restart or not (place / WHOLE).is_file():
                shutil.rmtree(place)
        if self.last() is None or journal.conditions is None:
            journal.begin(conditions)
        elif differing := differences(journal.conditions, conditions):
            journal.close()
            raise ConditionsDiffer(
                f"A half-finished recovery in {self.folder} has other conditions: "
                f"{'; '.join(differing)}. Give the same to go on, choose another --out, or discard "
                "it with --restart."
            )
        self._before = float(max(journal.of(SECONDS), default=0.0))
