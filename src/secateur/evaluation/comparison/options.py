"""The options of a comparison, and all that can be refused before a model is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from secateur.data.bos import readable
from secateur.deployment.runtimes import find_runtime
from secateur.errors import BadPattern
from secateur.evaluation.comparison.grid import Cell, cells, check_searched
from secateur.evaluation.results.schema import find_tolerance
from secateur.evaluation.tasks.answer import check_tasks
from secateur.recovery.checks import check_way
from secateur.system.devices import Resources, find_resources
from secateur.system.machine import typed_command
from secateur.system.progress import Progress
from secateur.system.settings import (
    CalibrationDraws,
    CalibrationText,
    Compute,
    Destination,
    EvaluationText,
    Grid,
    RecoveredRows,
    TimedRows,
    Training,
    Trust,
    ZeroShot,
    taken,
)


@dataclass(frozen=True)
class Comparison:
    """What a comparison was asked for, checked.

    `texts` are the calibration texts of the draws, each with the number of its corpus; `cells` are
    the rows; `tolerance` is a share of the dense perplexity. Tasks have their names written out.
    """

    model: str | Path | None
    cells: list[Cell]
    texts: list[tuple[CalibrationText, int]]
    tolerance: float | None
    grid: Grid
    recovered: RecoveredRows
    zero_shot: ZeroShot
    timed: TimedRows
    text: EvaluationText
    resources: Resources
    destination: Destination
    trust: Trust
    progress: Progress

    @property
    def device(self) -> torch.device:
        """The device on which models are judged."""
        return self.resources.devices[0]

    @property
    def out(self) -> Path:
        return Path(self.destination.out)

    @property
    def data_dir(self) -> Path | None:
        return Path(self.text.data_dir) if self.text.data_dir else None


def read_options(given: Mapping[str, Any]) -> Comparison:
    """The options of a call of `compare`. Raises SecateurError for what is wrong with any model."""
    grid, recovered = taken(Grid, given), taken(RecoveredRows, given)
    timed, zero_shot = taken(TimedRows, given), taken(ZeroShot, given)
    text = readable(taken(EvaluationText, given))
    for name in timed.bench:
        find_runtime(name)
    for way in recovered.recover:
        check_way(Training(way=way), "the dense model")
    resources, tolerance = find_resources(taken(Compute, given)), find_tolerance(grid.tolerance)
    tasks = check_tasks(zero_shot, Path(text.data_dir) if text.data_dir else None)
    texts, rows = _texts(taken(CalibrationDraws, given), text), cells(grid)
    if tolerance is not None:
        check_searched(rows)
    return Comparison(
        model=given["model"],
        cells=rows,
        texts=texts,
        tolerance=tolerance,
        grid=grid,
        recovered=recovered,
        zero_shot=replace(zero_shot, tasks=tasks),
        timed=timed,
        text=text,
        resources=resources,
        destination=replace(
            taken(Destination, given), overwrite=True, command=typed_command(given["command"])
        ),
        trust=taken(Trust, given),
        progress=given["progress"] or Progress(),
    )


def _texts(draws: CalibrationDraws, text: EvaluationText) -> list[tuple[CalibrationText, int]]:
    """The text of each draw with the number of its corpus: first text, most samples, seed first."""
    named = draws.calibration
    corpora: list[str | None] = [named] if named is None or isinstance(named, str) else [*named]
    counts = [draws.samples] if isinstance(draws.samples, int) else {*draws.samples}
    seeds = [draws.seed] if isinstance(draws.seed, int) else dict.fromkeys(draws.seed)
    if not corpora or not counts or not seeds:
        raise BadPattern(
            "A comparison wants at least one calibration text, one number of samples and one seed."
        )
    shared = CalibrationText(
        seq_len=text.seq_len,
        data_dir=text.data_dir,
        bos=text.bos,
        calibration_on=draws.calibration_on,
        self_temperature=draws.self_temperature,
        self_tokens=draws.self_tokens,
    )
    readable(shared)
    return [
        (replace(shared, calibration=corpus, samples=samples, seed=seed), corpora.index(corpus))
        for corpus, samples, seed in product(
            dict.fromkeys(corpora), sorted(counts, reverse=True), seeds
        )
    ]
