"""How a row is made: a model is pruned, and evaluated beside the dense one by windows."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.checkpoints.record import Report, Seconds
from secateur.data.reader import Reader
from secateur.data.windows import Windows
from secateur.evaluation.bits import bits_per_byte, text_bytes
from secateur.evaluation.comparison.grid import NOTHING, Cell, Draw
from secateur.evaluation.comparison.options import Comparison
from secateur.evaluation.comparison.row_store import CHECKPOINTS, RowStore, file_name
from secateur.evaluation.comparison.sizes import size_of
from secateur.evaluation.forward import Forward
from secateur.evaluation.perplexity import Measured, measure
from secateur.evaluation.results.schema import Row, row_name
from secateur.methods.values import parse_values
from secateur.models.load import load
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.pruning.structured.feasibility import Feasibility
from secateur.pruning.structured.method import Slices
from secateur.pruning.structured.program import prune_structure
from secateur.system.settings import Recipe
from secateur.system.tensors import count_zeros


@dataclass
class ComparisonContext:
    """What all rows of a comparison have in common: the options, the model, the texts.

    `dense` runs the dense model over the evaluation windows `judged`, which `reader` has read;
    `training` is the text that rows are fine-tuned on, None where none is.
    """

    asked: Comparison
    source: Checkpoint
    dense: Forward
    draws: Sequence[Draw]
    store: RowStore
    feasibility: Feasibility
    reader: Reader
    judged: Windows
    training: Windows | None = None

    @property
    def out(self) -> Path:
        return self.asked.out

    @cached_property
    def expected(self) -> Measured:
        """The dense model's loss."""
        return Measured(np.asarray(self.dense_row().loss))

    def in_bits(self, rows: Sequence[Row]) -> None:
        """Say the loss of rows in bits a byte as well."""
        size = text_bytes(self.reader, self.judged.ids)
        for row in rows:
            row.bits_per_byte = bits_per_byte(np.asarray(row.loss), self.judged.ids.shape[1], size)

    def dense_row(self) -> Row:
        """The row of the model as it came."""
        if kept := self.store.get(row_name("dense", "-"), None):
            return kept
        self.asked.progress.begin("evaluating the dense model")
        model = self.dense.language_model
        measured = measure(self.dense, None, self.asked.progress)
        size = size_of(model, self.source.bytes, None)
        row = Row(
            method="dense",
            pattern="-",
            kind="dense",
            sparsity=_zeros(model),
            perplexity=measured.perplexity,
            delta=0.0,
            delta_interval=(0.0, 0.0),
            kl=0.0,
            top1_agreement=1.0,
            acceptance=1.0,
            seconds=asdict(Seconds()),
            peak_bytes=None,
            disk_bytes=size.model_bytes,
            bits=size.bits,
            stored_as=size.stored_as,
            parameters=model.model.num_parameters(),
            loss=measured.loss.tolist(),
        )
        return self.keep(row)

    def row(self, cell: Cell, draw: Draw, *, searching: bool = False) -> Row:
        """A pruned row, made or taken from the store; the checkpoint stays for the first draw
        alone.

        A row that a search makes is marked as `searched` until it is known to be the one; a row
        that it has passed by has no checkpoint any more, and does for another search, but not for
        the table.
        """
        number = draw.number if cell.calibrated else None
        label = draw.label if number else ""
        kept = self.store.get(cell.name, number, label)
        if kept and (searching or number or kept.checkpoint):
            if kept.searched and not searching:
                kept.searched = False
                self.store.put(kept, label)
            return kept
        place = self.out / CHECKPOINTS / file_name(cell.name + label)
        row = replace(
            self._judged(self._pruned(cell, draw, place), place),
            calibration=number,
            checkpoint=str(place.relative_to(self.out)),
            searched=searching,
        )
        if number:
            self.forget(row, label)
        else:
            self.store.put(row, label)
        return row

    def _pruned(self, cell: Cell, draw: Draw, place: Path) -> Report:
        asked = self.asked
        recipe = Recipe(
            method=cell.method,
            pattern=cell.pattern,
            allocate=cell.rule,
            values=cell.values,
            align=asked.grid.align if cell.structured else None,
            skip=asked.grid.skip,
            keep_zeros=asked.grid.keep_zeros and not cell.structured,
            draft_heads=asked.grid.draft_heads if cell.structured else "refuse",
        )
        opened = Opened(self.source, self.dense.language_model, draw.windows)
        destination = replace(asked.destination, out=place)
        chosen = find_recipe(recipe)
        rest = (asked.resources, destination, asked.trust, asked.progress)
        if isinstance(chosen, Slices):
            return prune_structure(opened, chosen, *rest, self.feasibility)
        return prune_checkpoint(opened, chosen, *rest)

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
        self.asked.progress.begin(f"evaluating {report.method} {report.pattern}")
        pruned, values = self._loaded(place), parse_values(report.values)
        left = [matrix.site for matrix in report.sites if matrix.pattern is None]
        size = size_of(pruned, open_checkpoint(place).bytes, values, left)
        return Row(
            report.method,
            report.pattern,
            "quantised" if values and report.pattern == NOTHING else report.kind,
            report.sparsity,
            seconds=asdict(report.seconds),
            peak_bytes=report.peak_bytes,
            disk_bytes=size.model_bytes,
            bits=size.bits,
            stored_as=size.stored_as,
            values=report.values,
            allocation=report.allocation,
            parameters=pruned.model.num_parameters(),
            sites=[(matrix.site, matrix.sparsity, matrix.output_error) for matrix in report.sites],
            **self._quality(pruned),
        )

    def keep(self, row: Row) -> Row:
        """The row, which is on disk now."""
        self.store.put(row)
        return row

    def quality(self, place: Path) -> dict[str, Any]:
        """What a row says of the quality of a checkpoint, beside the dense model's."""
        return self._quality(self._loaded(place))

    def _loaded(self, place: Path) -> LanguageModel:
        spill = self.out if self.dense.language_model.spilled else None
        return load(place, trust_remote_code=self.asked.trust.trust_remote_code, spill=spill)

    def _quality(self, model: LanguageModel) -> dict[str, Any]:
        measured = measure(self.dense.of(model), self.dense, self.asked.progress)
        return {**measured.beside(self.expected), "loss": measured.loss.tolist()}


def _zeros(language_model: LanguageModel) -> float:
    """The share of zeros in the weight matrices of a model, which may have been pruned before."""
    weights = [
        matrix.stored
        for block in language_model.blocks
        for matrix in weight_matrices(block).values()
    ]
    return sum(map(count_zeros, weights)) / max(sum(weight.numel() for weight in weights), 1)
