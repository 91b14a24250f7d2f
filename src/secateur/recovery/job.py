"""One recovery: what it is given, how long it trains, and what it did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.checkpoints.result import Output, stamps
from secateur.data.windows import Windows
from secateur.models.replay import LanguageModel
from secateur.models.stream.distributed import Ranks
from secateur.recovery.checks import aims_at_dense
from secateur.system.machine import versions
from secateur.system.progress import Progress

BATCH_SIZE, SAVE_EVERY, RANK = 8, 100, 16
"""Windows of a forward pass, steps between checkpoints, and the rank of adapters, where nothing is
asked for.
"""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps` of `accumulate` × `batch_size` windows in each of the
    `processes`.

    A checkpoint is kept every `save_every` steps. `dtype` is what is multiplied; weights are
    trained in float32.
    """

    steps: int
    batch_size: int
    accumulate: int
    rate: float
    save_every: int
    seed: int
    checkpointing: bool = False
    processes: int = 1
    dtype: str = "float32"

    @property
    def windows(self) -> int:
        return self.steps * self.batch_size * self.accumulate * self.processes


@dataclass(frozen=True)
class Recovery:
    """What a recovery did: by which way, on how much text, in how many seconds over all runs, and
    the loss by step.

    `apart`: whether none of the text is that of the calibration; False where that could not be
    drawn again. `blocks`: what was trained block by block has no such loss, but the output error of
    every block before and after.
    """

    way: str
    steps: int
    tokens: int
    seconds: float
    rate: float
    dtype: str
    seed: int
    text: dict[str, Any]
    sparsity: float
    loss: list[tuple[int, float]] = field(repr=False)
    blocks: list[tuple[str, float, float]] = field(default_factory=list, repr=False)
    dense: str | None = None
    rank: int | None = None
    apart: bool = True
    out: Path | None = None


@dataclass(frozen=True)
class Job:
    """A recovery that is about to begin: the pruned checkpoint with its record, the dense model,
    the text, the rest.
    """

    way: str
    source: Checkpoint
    record: dict[str, Any]
    pruned: LanguageModel
    dense: LanguageModel | None
    windows: Windows
    schedule: Schedule
    rank: int
    device: torch.device
    out: Path
    overwrite: bool
    restart: bool
    command: Sequence[str]
    progress: Progress
    ranks: Ranks
    dense_folder: Path | None
    trust_remote_code: bool
    apart: bool
    started: float = field(default_factory=perf_counter)

    @property
    def aims(self) -> bool:
        """Whether the dense model is what is aimed at."""
        return aims_at_dense(self.way)

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be the same for a run that died to be taken up, as JSON can hold it."""
        held = {
            "way": self.way,
            **asdict(self.schedule),
            "rank": self.rank,
            "text": self.windows.fingerprint(),
            "device": self.device.type,
            "versions": versions(),
            "files": stamps(self.source),
            "dense": stamps(open_checkpoint(self.dense_folder))
            if self.dense_folder and self.aims
            else None,
        }
        return json.loads(json.dumps(held))

    def done(self, seconds: float, **found: Any) -> Recovery:
        """What this recovery did in `seconds`."""
        return Recovery(
            self.way,
            self.schedule.steps,
            self.windows.ids.numel(),
            seconds,
            self.schedule.rate,
            self.schedule.dtype,
            self.schedule.seed,
            self.windows.fingerprint(),
            float(self.record["sparsity"]),
            apart=self.apart,
            dense=str(self.dense_folder) if self.dense_folder else None,
            out=self.out,
            **found,
        )

    def finish(self, result: Output, done: Recovery) -> None:
        """Give a result its name, with the record of the pruned checkpoint continued."""
        told = {key: value for key, value in asdict(done).items() if key != "out"}
        entry = {**told, "command": list(self.command), "versions": versions()}
        result.finish({**self.record, "recovery": [*self.record.get("recovery", []), entry]})
