"""Rows that are fine-tuned after they were pruned: all with the same steps, on the same text, seen
nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.folder import open_checkpoint, stored_dtype
from secateur.checkpoints.record import record_of
from secateur.data.windows import Windows
from secateur.errors import BadCheckpoint, ConditionsDiffer
from secateur.evaluation.results.schema import Recovered, Row
from secateur.models.load import load
from secateur.models.replay import LanguageModel
from secateur.recovery.checks import pruning_record
from secateur.recovery.job import Dense, Job, Pruned
from secateur.recovery.recover import dtype_of, rate_of
from secateur.recovery.recover import run as run_recovery
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Training, Trust


@dataclass(frozen=True)
class Recovering:
    """How every pruned row is recovered: by which `ways`, on `windows`, towards `model`, which is
    in `dense`.
    """

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

    def told(self, way: str) -> Recovered:
        """What a row says of a way, apart from the seconds that it took."""
        training = self._training(way)
        return Recovered(
            way,
            training.steps,
            self.windows.ids.numel(),
            rate_of(way, self.model),
            self._dtype(way),
            training.seed,
            self.windows.fingerprint(),
        )

    def refuse_other(self, row: Row) -> None:
        """Raise ConditionsDiffer where a row that is there already was recovered on other text, or
        otherwise.
        """
        assert row.recovered is not None
        for key, value in _conditions(self.told(row.recovered.way)).items():
            if (before := getattr(row.recovered, key)) != value:
                raise ConditionsDiffer(
                    f"{row.name} was recovered with {key} {before}, now it is {value}. Rows of different "
                    "conditions do not go into one table: choose another --out, or delete that row."
                )

    def run(self, pruned: Path, place: Path, way: str) -> float:
        """Recover a checkpoint to `place`, where that is not done already; the seconds that it
        took, over all runs.
        """
        source = open_checkpoint(pruned)
        if (seconds := self._done(pruned, place, way)) is not None:
            return seconds
        self.progress.begin(f"loading {pruned.name}")
        trust = self.trust_remote_code
        return run_recovery(
            Job(
                training=self._training(way),
                rate=rate_of(way, self.model),
                dtype=self._dtype(way),
                pruned=Pruned(
                    source, pruning_record(source), load(pruned, trust_remote_code=trust)
                ),
                dense=Dense(self.dense, load(self.dense, trust_remote_code=trust)),
                windows=self.windows,
                destination=Destination(
                    out=place, overwrite=True, restart=self.restart, command=self.command
                ),
                trust=Trust(trust_remote_code=trust),
                device=self.device,
                progress=self.progress,
            )
        ).seconds

    @cached_property
    def _stored(self) -> torch.dtype:
        return stored_dtype(open_checkpoint(self.dense))

    def _training(self, way: str) -> Training:
        return Training(way=way, steps=self.steps, seed=self.windows.seed or 0)

    def _dtype(self, way: str) -> str:
        return dtype_of(way, Training.dtype, self.device, self._stored)

    def _done(self, pruned: Path, place: Path, way: str) -> float | None:
        """The seconds of a recovery of these very weights that had ended when a run died, before
        its row was kept.
        """
        try:
            before, after = record_of(pruned), record_of(place)
            if not before or not after:
                return None
            told = after["recovery"][-1]
            same = {shard: held["source_sha256"] for shard, held in after["shards"].items()} == {
                shard: held["sha256"] for shard, held in before["shards"].items()
            }
            if same and all(
                told[key] == value for key, value in _conditions(self.told(way)).items()
            ):
                return float(told["seconds"])
        except (BadCheckpoint, KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass
        return None


def _conditions(told: Recovered) -> dict[str, Any]:
    """What must be the same for rows to stand in one table."""
    return {key: value for key, value in asdict(told).items() if key != "seconds"}
