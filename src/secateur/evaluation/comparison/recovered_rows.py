"""Rows that are fine-tuned after they were pruned: all with the same steps, on the same text, seen
nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
from secateur.system.settings import Destination, RecoveredRows, Training, Trust


@dataclass(frozen=True)
class Recovering:
    """How every pruned row is recovered: by which ways, on `windows`, towards `model`, which is in
    the folder `dense`.
    """

    rows: RecoveredRows
    windows: Windows
    model: LanguageModel
    dense: Path
    device: torch.device
    destination: Destination
    trust: Trust
    progress: Progress

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(self.rows.recover))

    def recovered(self, way: str) -> Recovered:
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
        for key, value in _conditions(self.recovered(row.recovered.way)).items():
            if (before := getattr(row.recovered, key)) != value:
                raise ConditionsDiffer(
                    f"{row.name} was recovered with {key} {before}, now it is {value}. Rows of "
                    "different conditions do not go into one table: choose another --out, or "
                    "delete that row."
                )

    def run(self, pruned: Path, place: Path, way: str) -> float:
        """Recover a checkpoint to `place`, where that is not done already; the seconds that it
        took, over all runs.
        """
        source = open_checkpoint(pruned)
        if (seconds := self._done(pruned, place, way)) is not None:
            return seconds
        self.progress.begin(f"loading {pruned.name}")
        trust = self.trust.trust_remote_code
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
                destination=replace(self.destination, out=place, overwrite=True),
                trust=self.trust,
                device=self.device,
                progress=self.progress,
            )
        ).seconds

    @cached_property
    def _stored(self) -> torch.dtype:
        return stored_dtype(open_checkpoint(self.dense))

    def _training(self, way: str) -> Training:
        return Training(way=way, steps=self.rows.recover_steps, seed=self.windows.seed or 0)

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
            recovery = after["recovery"][-1]
            sources = {name: shard["source_sha256"] for name, shard in after["shards"].items()}
            pruned_shards = {name: shard["sha256"] for name, shard in before["shards"].items()}
            wanted = _conditions(self.recovered(way)).items()
            if sources == pruned_shards and all(recovery[key] == value for key, value in wanted):
                return float(recovery["seconds"])
        except (BadCheckpoint, KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass
        return None


def _conditions(recovered: Recovered) -> dict[str, Any]:
    """What must be the same for rows to stand in one table."""
    return {key: value for key, value in asdict(recovered).items() if key != "seconds"}
