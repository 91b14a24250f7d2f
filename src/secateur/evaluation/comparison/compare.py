"""The grid: every method with every pattern on the same model, the same calibration tokens, the
same metric.

Each row is pruned, evaluated and kept in `OUT/rows/` as soon as it is finished, with the conditions
it was measured under; the same command again computes only what is missing. A folder whose rows
were measured under other conditions is refused, and so is nothing else: there is no way to put two
conditions into one table.

Rows are ranked by perplexity within one pattern only, so that kinds of sparsity are never ranked
against each other, and two rows whose paired difference has a 95 % interval that contains zero are
a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.data.windows import Windows, load_tokenizer
from secateur.deployment.formats.packed import VALUES
from secateur.deployment.runtimes import find_runtime
from secateur.errors import BadPattern, OutputRefused, UnknownName, UnsupportedModel
from secateur.evaluation.comparison.grid import Cell, Draw, cells
from secateur.evaluation.comparison.recovered_rows import Recovering
from secateur.evaluation.comparison.row_store import RowStore
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.comparison.task_rows import answer_rows
from secateur.evaluation.comparison.timed_rows import time_rows
from secateur.evaluation.comparison.tolerance import check_searched, reaches
from secateur.evaluation.perplexity import Forward, judged_windows
from secateur.evaluation.report.write import write_report
from secateur.evaluation.results.ranking import rank
from secateur.evaluation.results.schema import SCHEMA, Results, find_tolerance
from secateur.evaluation.tasks.answer import check_tasks
from secateur.methods import find_method
from secateur.methods.patterns import parse
from secateur.methods.structures import Structure
from secateur.models.context import check_windows, default_corpus
from secateur.models.load import load, resolve
from secateur.models.mapped_experts import spill_folder
from secateur.models.matrices import matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import BlockRun
from secateur.pruning.opening import draw_calibration
from secateur.pruning.planning.memory import check_passes, way_through
from secateur.pruning.structured.feasibility import Feasibility
from secateur.pruning.structured.program import refuse_structure
from secateur.recovery.checks import check_way
from secateur.recovery.text import recovery_windows
from secateur.system.devices import calibration_dtype, find_devices, find_dtype, forward_dtype
from secateur.system.files import file_sha256, write_whole
from secateur.system.machine import machine, typed_command, versions
from secateur.system.progress import Progress
from secateur.system.settings import (
    CalibrationDraws,
    CalibrationText,
    Compute,
    Destination,
    EvaluationText,
    Grid,
    Recipe,
    RecoveredRows,
    TimedRows,
    Training,
    Trust,
    ZeroShot,
    taken,
)
from secateur.system.sizes import find_size

HIDDEN = "dense.hidden"
"""The file with the last hidden states of the dense model, while rows are made."""


def compare(
    model: str | Path | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] = Grid.methods,
    patterns: Sequence[str] = Grid.patterns,
    allocate: Sequence[str] = Grid.allocate,
    values: Sequence[str] = Grid.values,
    recover: Sequence[str] = RecoveredRows.recover,
    recover_steps: int = RecoveredRows.recover_steps,
    recover_text: str | None = RecoveredRows.recover_text,
    tolerance: str | float | None = Grid.tolerance,
    tasks: Sequence[str] = ZeroShot.tasks,
    limit: int | None = ZeroShot.limit,
    bench: Sequence[str] = TimedRows.bench,
    bench_dtype: str = TimedRows.bench_dtype,
    align: int | None = Grid.align,
    calibration: str | Sequence[str] | None = CalibrationDraws.calibration,
    evaluation: str | None = EvaluationText.evaluation,
    samples: int | Sequence[int] = CalibrationDraws.samples,
    windows: int | None = EvaluationText.windows,
    seq_len: int | None = EvaluationText.seq_len,
    seed: int | Sequence[int] = CalibrationDraws.seed,
    skip: Sequence[str] = Grid.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    data_dir: str | Path | None = EvaluationText.data_dir,
    restart: bool = Destination.restart,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    trust_remote_code: bool = Trust.trust_remote_code,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Prune and evaluate a model with every method and pattern, beside each other under the same
    conditions; write `results.json`, `report.html` and `report.md` to `out`.

    The options are those of the command, whose help says what each is. With several `samples`,
    seeds or texts every row is made for every draw: the table has the first text, most samples and
    first seed. Pruned checkpoints of the table stay in `out/checkpoints`; the same call again
    computes only what is missing. Raises SecateurError; ConditionsDiffer where `out` holds rows of
    another model, text or metric.
    """
    asked = Comparison.read(locals())
    checked = _check(asked)
    context, results = _open(asked, checked)
    _make_rows(context, results, checked, values)
    _write(context, results, asked)
    asked.progress.end()
    return results


@dataclass(frozen=True)
class Comparison:
    """The options of a comparison."""

    model: str | Path | None
    grid: Grid
    recovered: RecoveredRows
    zero_shot: ZeroShot
    timed: TimedRows
    draws: CalibrationDraws
    text: EvaluationText
    compute: Compute
    destination: Destination
    trust: Trust
    progress: Progress

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Comparison:
        """The options among the keywords of `compare`."""
        return cls(
            given["model"],
            taken(Grid, given),
            taken(RecoveredRows, given),
            taken(ZeroShot, given),
            taken(TimedRows, given),
            taken(CalibrationDraws, given),
            taken(EvaluationText, given),
            taken(Compute, given),
            replace(
                taken(Destination, given),
                out=Path(given["out"]),
                overwrite=True,
                command=typed_command(given["command"]),
            ),
            taken(Trust, given),
            given["progress"] or Progress(),
        )

    @property
    def data_dir(self) -> Path | None:
        return Path(self.text.data_dir) if self.text.data_dir else None


class Checked(NamedTuple):
    """The options of a comparison that are read before anything is opened.

    `texts` are the calibration texts of the draws, each with its number among the corpora; `share`
    is the tolerance; `memory` is in bytes, and in `compute` too.
    """

    cells: list[Cell]
    texts: list[tuple[CalibrationText, int]]
    share: float | None
    compute: Compute
    memory: int | None
    device: torch.device


def _check(asked: Comparison) -> Checked:
    """Raise a SecateurError for all that can be refused before a model is opened."""
    for name in asked.grid.values:
        if name not in VALUES:
            raise UnknownName("kind of values", name, VALUES)
    for name in asked.timed.bench:
        find_runtime(name)
    for way in asked.recovered.recover:
        check_way(Training(way=way), "the dense model")
    check_passes(asked.compute.passes)
    memory, share = find_size(asked.compute.memory), find_tolerance(asked.grid.tolerance)
    check_tasks(asked.zero_shot, asked.data_dir)
    texts = _texts(asked.draws, asked.text)
    grid = cells(asked.grid)
    if share is not None:
        check_searched(grid)
    device = find_devices(asked.compute.device)[0]
    compute = replace(asked.compute, dtype=find_dtype(asked.compute.dtype), memory=memory)
    return Checked(grid, texts, share, compute, memory, device)


def _texts(draws: CalibrationDraws, text: EvaluationText) -> list[tuple[CalibrationText, int]]:
    """The text of every draw with the number of its corpus. The draw of the table comes first: of
    the first text, most samples, first seed.
    """
    corpora: list[str | None] = (
        [draws.calibration]
        if draws.calibration is None or isinstance(draws.calibration, str)
        else [*draws.calibration]
    )
    counts = [draws.samples] if isinstance(draws.samples, int) else {*draws.samples}
    seeds = [draws.seed] if isinstance(draws.seed, int) else dict.fromkeys(draws.seed)
    if not corpora or not counts or not seeds:
        raise BadPattern(
            "A comparison wants at least one calibration text, one number of samples and one seed."
        )
    return [
        (
            CalibrationText(
                calibration=corpus,
                samples=samples,
                seq_len=text.seq_len,
                seed=seed,
                data_dir=text.data_dir,
            ),
            corpora.index(corpus),
        )
        for corpus, samples, seed in product(
            dict.fromkeys(corpora), sorted(counts, reverse=True), seeds
        )
    ]


def _open(asked: Comparison, checked: Checked) -> tuple[ComparisonContext, Results]:
    """Open the model, the texts and the rows that are there already; the results have no rows yet.

    Raises NotEnoughText, and ConditionsDiffer for rows that were measured under other conditions.
    """
    source, language_model, feasibility = _load(asked, checked)
    draws = [
        Draw(
            number,
            draw_calibration(language_model, source.folder, asked.model, text, asked.trust),
            corpus,
        )
        for number, (text, corpus) in enumerate(checked.texts)
    ]
    trust = asked.trust.trust_remote_code
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust)
    judged = judged_windows(language_model, tokenizer, asked.model, asked.text)
    check_windows(language_model, judged, checked.compute.batch_size)
    compute = replace(
        checked.compute, passes=_passes(asked, checked, language_model, draws[0].windows)
    )
    results = Results(
        SCHEMA,
        {
            "name": str(asked.model or "demo"),
            "parameters": language_model.model.num_parameters(),
            "shards": source.sha256(),
            "config": file_sha256(source.folder / "config.json"),
        },
        [draw.windows.fingerprint() for draw in draws],
        judged.fingerprint(),
        _conditions(asked.grid, compute, checked.device, language_model.model.dtype),
        machine(),
        versions(),
        [*(asked.destination.command or ())],
        [],
    )
    known = [judged, *(draw.windows for draw in draws)]
    recovering = _recovering(asked, language_model, source.folder, known, checked.device)
    context = ComparisonContext(
        source,
        _forward(asked, checked, language_model, judged),
        draws,
        _store(Path(asked.destination.out), results),
        Recipe(align=asked.grid.align, skip=asked.grid.skip),
        compute,
        asked.destination,
        asked.trust,
        asked.progress,
        feasibility,
        recovering,
    )
    return context, results


def _load(asked: Comparison, checked: Checked) -> tuple[Checkpoint, LanguageModel, Feasibility]:
    """Load the dense model, ask what it can lose. Raises where that is less than a row wants."""
    source = open_checkpoint(resolve(asked.model))
    asked.progress.begin(f"loading {asked.model or 'the demo model'}")
    hidden = Path(asked.destination.out) / HIDDEN
    language_model = load(
        source.folder,
        trust_remote_code=asked.trust.trust_remote_code,
        spill=spill_folder(hidden, source.bytes, checked.memory),
    )
    feasibility = Feasibility(language_model, checked.device)
    for pattern in dict.fromkeys(cell.pattern for cell in checked.cells):
        if isinstance(structure := parse(pattern), Structure):
            refuse_structure(feasibility, structure, source.bytes, asked.grid.align)
    return source, language_model, feasibility


def _forward(
    asked: Comparison, checked: Checked, language_model: LanguageModel, judged: Windows
) -> Forward:
    """The dense model over the evaluation windows; its last hidden states are kept in a file."""
    dtype = forward_dtype(checked.compute.dtype, checked.device)
    return Forward(
        language_model,
        judged.ids,
        checked.device,
        dtype,
        checked.compute.batch_size,
        spill=Path(asked.destination.out) / HIDDEN,
    )


def _conditions(
    grid: Grid, compute: Compute, device: torch.device, stored: torch.dtype
) -> dict[str, Any]:
    """The options that rows of one table have in common, as `results.json` holds them."""
    calibrating = calibration_dtype(compute.dtype, device, stored)
    return {
        "passes": compute.passes,
        "dtype": str(forward_dtype(compute.dtype, device)),
        "calibration dtype": str(calibrating or stored),
        "device": device.type,
        "skip": list(grid.skip),
        **({"align": grid.align} if grid.align else {}),
        "batch_size": compute.batch_size,
    }


def _recovering(
    asked: Comparison,
    language_model: LanguageModel,
    folder: Path,
    avoid: Sequence[Windows],
    device: torch.device,
) -> Recovering | None:
    """How rows are recovered, with the text for it; None where they are not. Raises
    NotEnoughText.
    """
    if not asked.recovered.recover:
        return None
    windows = recovery_windows(
        load_tokenizer(folder, trust_remote_code=asked.trust.trust_remote_code),
        default_corpus(asked.model, asked.recovered.recover_text, "c4"),
        count=asked.recovered.recover_steps * Training.batch_size,
        length=avoid[0].ids.shape[1],
        seed=avoid[1].seed or 0,
        avoid=[known.ids for known in avoid],
        data_dir=asked.data_dir,
    )
    check_windows(language_model, windows, Training.batch_size)
    return Recovering(
        asked.recovered,
        windows,
        language_model,
        folder,
        device,
        asked.destination,
        asked.trust,
        asked.progress,
    )


def _passes(
    asked: Comparison, checked: Checked, language_model: LanguageModel, calibration: Windows
) -> str:
    """How often blocks run, the same for all rows: once where that fits for each, and as before
    where there are rows already, since what is free changes from run to run.
    """
    recorded = RowStore(Path(asked.destination.out) / "rows", {}, []).recorded("passes")
    if checked.compute.passes != "auto" or recorded is not None:
        return checked.compute.passes if checked.compute.passes != "auto" else recorded
    shapes, limit = matrix_shapes(language_model), find_size(checked.compute.memory)
    stored, devices = language_model.model.dtype, find_devices(checked.compute.device)
    forward = calibration_dtype(checked.compute.dtype, checked.device, stored)
    devices, batch_size = [checked.device] * len(devices), checked.compute.batch_size
    run = BlockRun(language_model, calibration.ids, devices, forward, batch_size)
    ways = (
        way_through(run, find_method(method), shapes, "auto", limit)["passes"]
        for method in dict.fromkeys(cell.method for cell in checked.cells if not cell.structured)
    )
    return "two" if "two" in ways else "one"


def _store(out: Path, results: Results) -> RowStore:
    """The rows that are there already. Raises ConditionsDiffer where they were measured under other
    conditions.
    """
    conditions = {
        "schema": results.schema,
        "model": results.model["shards"],
        "config": results.model["config"],
        "evaluation": results.evaluation,
        "versions": results.versions,
        **results.options,
    }
    try:
        (out / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"{out} cannot be written: {error.strerror}.") from error
    store = RowStore(out / "rows", conditions, results.calibrations)
    store.check()
    return store


def _make_rows(
    context: ComparisonContext, results: Results, checked: Checked, values: Sequence[str]
) -> None:
    """Fill in the rows, and what a search for the tolerance found; say what was left out."""
    try:
        results.rows = [context.dense_row()]
        for cell in checked.cells:
            row = context.row(cell, context.draws[0])
            results.rows.append(row)
            if "int8" in values and not cell.structured:
                try:
                    results.rows.append(context.rounded(row))
                except UnsupportedModel as error:  # too few zeros to pack
                    results.not_timed[cell.name("int8")] = str(error)
            results.rows += context.recovered(row, results.not_timed)
            results.rows += [
                context.row(cell, draw) for draw in context.draws[1:] if cell.calibrated
            ]
        if checked.share is not None:
            found, made = reaches(context, checked.cells, results.table, checked.share)
            results.rows += made
            results.tolerance = {
                "share": checked.share,
                "found": [asdict(reach) for reach in found],
            }
    finally:
        (context.out / HIDDEN).unlink(missing_ok=True)
    rank([row for row in results.rows if not row.searched])


def _write(context: ComparisonContext, results: Results, asked: Comparison) -> None:
    """Write the results, then have the rows answer tasks and be timed, and write all of it."""
    out, dense = context.out, context.source.folder
    write_whole(out / "results.json", results.json())
    if asked.zero_shot.tasks:
        answer_rows(context, results.table, asked.zero_shot, asked.data_dir)
    if asked.timed.bench:
        results.not_timed |= time_rows(results.table, dense, out, asked.timed, context.progress)
    write_whole(out / "results.json", results.json())
    write_report(results, out)
