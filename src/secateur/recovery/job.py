"""One recovery: what it is given, and what it did."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.checkpoints.seal import stamps
from secateur.data.windows import Windows
from secateur.models.replay import LanguageModel
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.system.machine import typed_command, versions
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Training, Trust


def aims_at_dense(way: str) -> bool:
    """Whether a way aims at what the dense model does."""
    return way.endswith("distill") or way == "blocks"


class Pruned(NamedTuple):
    """A pruned model in memory, its checkpoint, and what its pruning.json says."""

    source: Checkpoint
    record: dict[str, Any]
    language_model: LanguageModel


class Dense(NamedTuple):
    """The model that was pruned, and its folder."""

    folder: Path
    language_model: LanguageModel


@dataclass(frozen=True)
class Recovery:
    """What a recovery did, on how much text, in how many seconds over all runs, and the loss by
    step.

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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recovery that is about to begin: its models are loaded and its text is drawn.

    `rate` and `dtype` are those of `training` where it names them. `apart` as in `Recovery`.
    """

    training: Training
    rate: float
    dtype: str
    pruned: Pruned
    dense: Dense | None
    windows: Windows
    destination: Destination
    trust: Trust
    device: torch.device
    progress: Progress
    ranks: Ranks = ALONE
    apart: bool = True
    started: float = field(default_factory=perf_counter)

    @property
    def out(self) -> Path:
        return Path(self.destination.out)

    @property
    def target(self) -> Dense | None:
        """The dense model, where it is what is aimed at."""
        return self.dense if aims_at_dense(self.training.way) else None

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be the same for a run that died to be taken up."""
        options = asdict(self.training)
        options["checkpointing"] = options.pop("gradient_checkpointing")
        target = self.target
        return options | {
            "rate": self.rate,
            "dtype": self.dtype,
            "processes": self.ranks.size,
            "text": self.windows.fingerprint(),
            "device": self.device.type,
            "versions": versions(),
            "files": stamps(self.pruned.source),
            "dense": stamps(open_checkpoint(target.folder)) if target else None,
        }

    def recovery(
        self,
        seconds: float,
        loss: list[tuple[int, float]],
        blocks: list[tuple[str, float, float]] | None = None,
    ) -> Recovery:
        """What this recovery did in `seconds`."""
        training = self.training
        return Recovery(
            way=training.way,
            steps=training.steps,
            tokens=self.windows.ids.numel(),
            seconds=seconds,
            rate=self.rate,
            dtype=self.dtype,
            seed=training.seed,
            text=self.windows.fingerprint(),
            sparsity=float(self.pruned.record["sparsity"]),
            loss=loss,
            blocks=blocks or [],
            dense=str(self.dense.folder) if self.dense else None,
            rank=training.rank if training.way.startswith("lora") else None,
            apart=self.apart,
            out=self.out,
        )

    def record(self, recovery: Recovery) -> dict[str, Any]:
        """What pruning.json holds of the result: the record of the pruned checkpoint, continued."""
        record, entry = self.pruned.record, asdict(recovery)
        del entry["out"]
        entry["command"] = typed_command(self.destination.command)
        entry["versions"] = versions()
        entry["text"] = self.windows.record()
        return {**record, "recovery": [*record.get("recovery", []), entry]}
