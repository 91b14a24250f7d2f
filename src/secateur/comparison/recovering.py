"""Rows that are fine-tuned after they were pruned: all with the same steps, on the same text, seen nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import open_checkpoint
from secateur.comparison.results import Row
from secateur.data import Windows
from secateur.errors import BadCheckpoint, ConditionsDiffer
from secateur.inspection import record_of
from secateur.model import load
from secateur.progress import Progress
from secateur.ranks import ALONE
from secateur.recovery.checks import pruning_record
from secateur.recovery.job import BATCH_SIZE, RANK, SAVE_EVERY, Job, Schedule
from secateur.recovery.recover import carry_out, rate_of
from secateur.replay import LanguageModel


@dataclass(frozen=True)
class Recovering:
    """How every pruned row is recovered: by which `ways`, on `windows`, towards `model`, which is in `dense`."""

    ways: Sequence[str]
    steps: int
    windows: Windows
    model: LanguageModel
    dense: Path
    device: torch.device
    restart: bool
    command: Sequence[str]
    trust_remote_code: bool
    progress: Progress

    def told(self, way: str) -> dict[str, Any]:
        """What `Row.recovered` says of a way, apart from the seconds that it took."""
        schedule = self._schedule(way)
        return {
            "way": way, "steps": schedule.steps, "tokens": self.windows.ids.numel(), "rate": schedule.rate,
            "seed": schedule.seed, "text": self.windows.fingerprint(),
        }  # fmt: skip

    def refuse_other(self, row: Row) -> None:
        """Raise ConditionsDiffer where a row that is there already was recovered on other text, or otherwise."""
        assert row.recovered is not None
        for key, value in self.told(row.recovered["way"]).items():
            if row.recovered[key] != value:
                raise ConditionsDiffer(
                    f"{row.name} was recovered with {key} {row.recovered[key]}, now it is {value}. Rows of different "
                    "conditions do not go into one table: choose another --out, or delete that row."
                )

    def run(self, pruned: Path, place: Path, way: str) -> float:
        """Recover a checkpoint to `place`, where that is not done already; the seconds that it took, over all runs."""
        source = open_checkpoint(pruned)
        if (seconds := self._done(pruned, place, way)) is not None:
            return seconds
        self.progress.begin(f"loading {pruned.name}")
        return carry_out(
            Job(
                way, source, pruning_record(source), load(pruned, trust_remote_code=self.trust_remote_code),
                load(self.dense, trust_remote_code=self.trust_remote_code), self.windows, self._schedule(way), RANK,
                self.device, place, True, self.restart, self.command, self.progress, ALONE, self.dense,
                self.trust_remote_code, True,
            )
        ).seconds  # fmt: skip

    def _schedule(self, way: str) -> Schedule:
        return Schedule(self.steps, BATCH_SIZE, 1, rate_of(way, self.model), SAVE_EVERY, self.windows.seed or 0)

    def _done(self, pruned: Path, place: Path, way: str) -> float | None:
        """The seconds of a recovery of these very weights that had ended when a run died, before its row was kept."""
        try:
            before, after = record_of(pruned), record_of(place)
            if not before or not after:
                return None
            told = after["recovery"][-1]
            same = {shard: held["source_sha256"] for shard, held in after["shards"].items()} == {
                shard: held["sha256"] for shard, held in before["shards"].items()
            }
            if same and all(told[key] == value for key, value in self.told(way).items()):
                return float(told["seconds"])
        except (BadCheckpoint, KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass
        return None
