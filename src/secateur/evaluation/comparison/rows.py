"""How a row of a comparison is made: a model is pruned, and evaluated beside the dense one, window
by window.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.checkpoints.record import Report, Seconds
from secateur.deployment.export import export
from secateur.errors import NonFinite, UnsupportedModel
from secateur.evaluation.comparison.grid import Cell, Draw
from secateur.evaluation.comparison.recovered_rows import Recovering
from secateur.evaluation.comparison.row_store import CHECKPOINTS, RowStore, file_name
from secateur.evaluation.perplexity import Forward, Measured, measure, perplexity_difference
from secateur.evaluation.results.schema import Row, row_name
from secateur.models.load import load
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Destination, Recipe, Trust
from secateur.system.tensors import count_zeros


@dataclass
class ComparisonContext:
    """What all rows of a comparison have in common: the model, the text that it is judged on, how
    it is pruned.

    `recipe` and `destination` are those of every row, but for what a row has for itself.
    """

    source: Checkpoint
    dense: Forward
    out: Path
    store: RowStore
    draws: Sequence[Draw]
    recipe: Recipe
    compute: Compute
    destination: Destination
    trust: Trust
    progress: Progress

    @cached_property
    def expected(self) -> Measured:
        """The dense model's loss."""
        return Measured(np.asarray(self.dense_row().loss))

    def dense_row(self) -> Row:
        """The row of the model as it came."""
        if kept := self.store.get(row_name("dense", "-"), None):
            return kept
        self.progress.begin("evaluating the dense model")
        model = self.dense.language_model
        measured = measure(self.dense, None, self.progress)
        row = Row(
            "dense",
            "-",
            "dense",
            _zeros(model),
            measured.perplexity,
            0.0,
            (0.0, 0.0),
            0.0,
            1.0,
            asdict(Seconds()),
            None,
            self.source.bytes,
            parameters=model.model.num_parameters(),
            loss=measured.loss.tolist(),
        )
        self.store.put(row)
        return row

    def row(self, cell: Cell, draw: Draw, *, searching: bool = False) -> Row:
        """A pruned row, made or taken from the store; the checkpoint stays for the first draw
        alone.

        A row that a search makes is marked as `searched` until it is known to be the one; a row
        that it has passed by has no checkpoint any more, and does for another search, but not for
        the table.
        """
        number = draw.number if cell.calibrated else None
        label = draw.label if number else ""
        kept = self.store.get(cell.name(), number, label)
        if kept and (searching or number or kept.checkpoint):
            if kept.searched and not searching:
                kept.searched = False
                self.store.put(kept, label)
            return kept
        place = self.out / CHECKPOINTS / file_name(cell.name() + label)
        report = prune_checkpoint(
            Opened(self.source, self.dense.language_model, draw.windows),
            replace(
                self.recipe,
                method=cell.method,
                pattern=cell.pattern,
                allocate=cell.rule,
                align=self.recipe.align if cell.structured else None,
            ),
            self.compute,
            replace(self.destination, out=place),
            self.trust,
            self.progress,
        )
        row = self._judged(report, place)
        row.calibration, row.checkpoint, row.searched = (
            number,
            str(place.relative_to(self.out)),
            searching,
        )
        if number:
            self.forget(row, label)
        else:
            self.store.put(row, label)
        return row

    def forget(self, row: Row, label: str = "") -> None:
        """Delete the checkpoint of a row; its figures stay, and say first that there is none."""
        place, row.checkpoint = row.checkpoint, None
        self.store.put(row, label)
        if place:
            aside = self.out / CHECKPOINTS / f".{Path(place).name}.forgotten"
            shutil.rmtree(aside, ignore_errors=True)
            (self.out / place).rename(aside)
            shutil.rmtree(aside)

    def _judged(self, report: Report, place: Path) -> Row:
        self.progress.begin(f"evaluating {report.method} {report.pattern}")
        pruned = self._loaded(place)
        return Row(
            report.method,
            report.pattern,
            report.kind,
            report.sparsity,
            seconds=asdict(report.seconds),
            peak_bytes=report.peak_bytes,
            disk_bytes=open_checkpoint(place).bytes,
            allocation=report.allocation,
            parameters=pruned.model.num_parameters(),
            sites=[(site.site, site.sparsity, site.output_error) for site in report.sites],
            **self._evaluated(pruned),
        )

    def rounded(self, kept: Row) -> Row:
        """The row of a pruned checkpoint whose kept weights are rounded to int8: evaluated as they
        come back.
        """
        assert kept.checkpoint is not None
        name = row_name(kept.method, kept.pattern, kept.allocation, "int8")
        if held := self.store.get(name, kept.calibration):
            return held
        place = Path(f"{kept.checkpoint}-int8")
        self.progress.begin(f"evaluating {kept.name} int8")
        export(
            self.out / kept.checkpoint,
            out=self.out / place,
            to="packed",
            values="int8",
            overwrite=True,
            trust_remote_code=self.trust.trust_remote_code,
        )
        back = self.out / CHECKPOINTS / ".unpacked"
        export(
            self.out / place, out=back, to="dense", overwrite=True
        )  # one is there where a run died
        found = self._evaluated(self._loaded(back))
        shutil.rmtree(back)
        size = sum(file.stat().st_size for file in (self.out / place).glob("*.safetensors"))
        row = replace(
            kept,
            disk_bytes=size,
            checkpoint=str(place),
            values="int8",
            rank="",
            ties=[],
            latency=[],
            **found,
        )
        self.store.put(row)
        return row

    def recovered(self, kept: Row, recovering: Recovering, refused: dict[str, str]) -> list[Row]:
        """The rows of a pruned checkpoint after it was fine-tuned by each way; `refused` is told
        what cannot be.
        """
        found: list[Row] = []
        for way in recovering.ways:
            try:
                found.append(self._recovered(kept, way, recovering))
            except (
                UnsupportedModel,
                NonFinite,
            ) as error:  # adapters for experts, blocks that are gone, a loss of NaN
                refused[replace(kept, recovered=recovering.told(way)).name] = str(error)
        return found

    def _recovered(self, kept: Row, way: str, recovering: Recovering) -> Row:
        assert kept.checkpoint is not None
        row = replace(kept, recovered=recovering.told(way), rank="", ties=[], latency=[], sites=[])
        if held := self.store.get(row.name, kept.calibration):
            recovering.refuse_other(held)
            return held
        place = self.out / CHECKPOINTS / file_name(row.name)
        seconds = recovering.run(self.out / kept.checkpoint, place, way)
        self.progress.begin(f"evaluating {row.name}")
        row = replace(
            row,
            recovered=replace(recovering.told(way), seconds=seconds),
            seconds={**kept.seconds, "recover": seconds},
            checkpoint=str(place.relative_to(self.out)),
            **self._evaluated(self._loaded(place)),
        )
        self.store.put(row)
        return row

    def _loaded(self, place: Path) -> LanguageModel:
        spill = self.out if self.dense.language_model.spilled else None
        return load(place, trust_remote_code=self.trust.trust_remote_code, spill=spill)

    def _evaluated(self, model: LanguageModel) -> dict[str, Any]:
        """What a row says of the quality of a model, beside the dense one's."""
        measured = measure(self.dense.of(model), self.dense, self.progress)
        delta, interval = perplexity_difference(measured.loss, self.expected.loss)
        return {
            "perplexity": measured.perplexity,
            "delta": delta,
            "delta_interval": interval,
            "kl": measured.mean_kl or 0.0,
            "top1_agreement": measured.mean_agreement or 0.0,
            "loss": measured.loss.tolist(),
        }


def _zeros(language_model: LanguageModel) -> float:
    """The share of zeros in the sites of a model, which may have been pruned before."""
    held = [
        site.stored for block in language_model.blocks for site in weight_matrices(block).values()
    ]
    return sum(count_zeros(weight) for weight in held) / max(
        sum(weight.numel() for weight in held), 1
    )
