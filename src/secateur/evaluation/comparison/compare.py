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

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.data.overlap import overlapping, run_length
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import Windows
from secateur.errors import OutputRefused
from secateur.evaluation.bos import bos_note
from secateur.evaluation.comparison.grid import Draw
from secateur.evaluation.comparison.options import Comparison, read_options
from secateur.evaluation.comparison.recovered_rows import recovered_rows, training_windows
from secateur.evaluation.comparison.row_store import ROWS, RowStore, recorded_condition
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.comparison.task_rows import answer_rows
from secateur.evaluation.comparison.timed_rows import time_rows
from secateur.evaluation.comparison.tolerance import search_tolerance
from secateur.evaluation.forward import Forward
from secateur.evaluation.perplexity import judged_windows
from secateur.evaluation.report.write import write_report
from secateur.evaluation.results.ranking import rank, rank_at_equal_bytes
from secateur.evaluation.results.schema import SCHEMA, Results
from secateur.methods import find_method
from secateur.methods.pattern_text import parse
from secateur.methods.structures import Structure
from secateur.models.context import check_windows, reader_of
from secateur.models.load import load, resolve
from secateur.models.mapped_experts import spill_folder
from secateur.models.matrices import matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import BlockRun
from secateur.pruning.opening import draw_calibration
from secateur.pruning.own_text import Workplace
from secateur.pruning.planning.memory import way_through
from secateur.pruning.structured.expert_merging import refuse_unknown_neurons
from secateur.pruning.structured.feasibility import Feasibility
from secateur.pruning.structured.method import find_structured_method
from secateur.pruning.structured.program import refuse_draft_heads, refuse_structure
from secateur.system.devices import calibration_dtype, forward_dtype
from secateur.system.files import file_sha256, write_whole
from secateur.system.machine import machine, versions
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
    Trust,
    ZeroShot,
)

HIDDEN = "dense.hidden"
"""The file with the last hidden states of the dense model, while rows are made."""
OWN = "self"
"""The folder with what the model said itself, a file for each set of prompts and seed."""


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
    keep_zeros: bool = Grid.keep_zeros,
    draft_heads: str = Grid.draft_heads,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    data_dir: str | Path | None = EvaluationText.data_dir,
    bos: str = EvaluationText.bos,
    calibration_on: str = CalibrationDraws.calibration_on,
    self_temperature: float = CalibrationDraws.self_temperature,
    self_tokens: int = CalibrationDraws.self_tokens,
    restart: bool = Destination.restart,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
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
    asked = read_options(locals())
    context, results = _open(asked)
    _make_rows(context, results)
    _write(context, results)
    asked.progress.end()
    return results


def _open(asked: Comparison) -> tuple[ComparisonContext, Results]:
    """Open the model, the texts and the rows that are there already; the results have no rows yet.

    Raises NotEnoughText, and ConditionsDiffer for rows that were measured under other conditions.
    """
    source, language_model, feasibility = _load(asked)
    drawn = [
        draw_calibration(
            language_model,
            source.folder,
            asked.model,
            text,
            asked.trust,
            _workplace(asked, source, text, corpus),
        )
        for text, corpus in asked.texts
    ]
    draws = [Draw(number, windows, asked.texts[number][1]) for number, windows in enumerate(drawn)]
    tokenizer = load_tokenizer(source.folder, trust_remote_code=asked.trust.trust_remote_code)
    reader = reader_of(language_model, tokenizer, asked.text.bos)
    judged = judged_windows(language_model, reader, asked.model, asked.text)
    check_windows(language_model, judged, asked.resources.batch_size)
    passes = _passes(asked, language_model, draws[0].windows)
    asked = replace(asked, resources=replace(asked.resources, passes=passes))
    results = _results(asked, source, language_model, judged, draws)
    results.notes += overlap_notes(judged, drawn)
    windows = [judged, *(draw.windows for draw in draws)]
    training = training_windows(asked, language_model, reader, windows)
    dense = Forward(
        language_model,
        judged.ids,
        asked.device,
        forward_dtype(asked.resources.dtype, asked.device),
        asked.resources.batch_size,
        spill=asked.out / HIDDEN,
    )
    store = _store(asked.out, results)
    context = ComparisonContext(
        asked, source, dense, draws, store, feasibility, reader, judged, training
    )
    return context, results


def overlap_notes(judged: Windows, drawn: Sequence[Windows]) -> list[str]:
    """A sentence for each calibration text of which a draw shares tokens with the evaluation."""
    shared: dict[str, int] = {}
    size = run_length(judged.ids.shape[1], [windows.ids for windows in drawn])
    for windows in drawn:
        count = overlapping(judged.ids, windows.ids)
        shared[windows.source] = max(count, shared.get(windows.source, 0))
    return [
        f"{count} of {len(judged.ids)} evaluation windows share {size} tokens in a row or more "
        f"with the calibration text {source}: a model is judged there on what it was calibrated on."
        for source, count in shared.items()
        if count
    ]


def _workplace(
    asked: Comparison, source: Checkpoint, text: CalibrationText, corpus: int
) -> Workplace:
    """Where what the model says itself is kept: once for all rows, whatever number of samples."""
    file = asked.out / OWN / f"text-{corpus}-seed-{text.seed}"
    restart = asked.destination.restart
    return Workplace(file, source.sha256, asked.resources, asked.progress, restart)


def _load(asked: Comparison) -> tuple[Checkpoint, LanguageModel, Feasibility]:
    """Load the dense model, ask what it can lose. Raises where that is less than a row wants."""
    source = open_checkpoint(resolve(asked.model, asked.trust, progress=asked.progress))
    asked.progress.begin(f"loading {asked.model or 'the demo model'}")
    language_model = load(
        source.folder,
        trust_remote_code=asked.trust.trust_remote_code,
        spill=spill_folder(asked.out / HIDDEN, source.bytes, asked.resources.limit),
    )
    feasibility = Feasibility(language_model, asked.device)
    for pattern in dict.fromkeys(cell.pattern for cell in asked.cells):
        if isinstance(structure := parse(pattern), Structure):
            refuse_structure(feasibility, structure, source.bytes, asked.grid.align)
            refuse_draft_heads(language_model, structure, asked.grid.draft_heads)
            names = {cell.method for cell in asked.cells if cell.pattern == pattern}
            if any(find_structured_method(name, structure).merges for name in names):
                refuse_unknown_neurons(language_model)
    return source, language_model, feasibility


def _passes(asked: Comparison, language_model: LanguageModel, calibration: Windows) -> str:
    """How often blocks run, the same for all rows: as in the rows that are there already, since
    what is free changes from run to run; else once where that fits for each.
    """
    resources = asked.resources
    if resources.passes != "auto":
        return resources.passes
    if (recorded := recorded_condition(asked.out, "passes")) is not None:
        return recorded
    forward = calibration_dtype(resources.dtype, asked.device, language_model.model.dtype)
    devices = [asked.device] * len(resources.devices)
    run = BlockRun(language_model, calibration.ids, devices, forward, resources.batch_size)
    shapes, limit = matrix_shapes(language_model), resources.limit
    methods = dict.fromkeys(cell.method for cell in asked.cells if not cell.structured)
    ways = (
        way_through(run, find_method(method), shapes, "auto", limit)["passes"] for method in methods
    )
    return "two" if "two" in ways else "one"


def _results(
    asked: Comparison,
    source: Checkpoint,
    language_model: LanguageModel,
    judged: Windows,
    draws: Sequence[Draw],
) -> Results:
    """The results without rows. Their options are what rows of one table have in common."""
    resources, grid = asked.resources, asked.grid
    stored = language_model.model.dtype
    options = {
        "passes": resources.passes,
        "dtype": str(forward_dtype(resources.dtype, asked.device)),
        "calibration dtype": str(
            calibration_dtype(resources.dtype, asked.device, stored) or stored
        ),
        "device": asked.device.type,
        "skip": list(grid.skip),
        **({"align": grid.align} if grid.align else {}),
        **({"keep_zeros": True} if grid.keep_zeros else {}),
        "batch_size": resources.batch_size,
    }
    model = {
        "name": str(asked.model or "demo"),
        "parameters": language_model.model.num_parameters(),
        "shards": source.sha256(),
        "config": file_sha256(source.folder / "config.json"),
    }
    return Results(
        SCHEMA,
        model,
        [draw.windows.fingerprint() for draw in draws],
        judged.fingerprint(),
        options,
        machine(),
        versions(),
        [*(asked.destination.command or ())],
        [],
    )


def _store(out: Path, results: Results) -> RowStore:
    """The rows that are there. Raises ConditionsDiffer for those of other conditions."""
    conditions = {
        "schema": results.schema,
        "model": results.model["shards"],
        "config": results.model["config"],
        "evaluation": results.evaluation,
        "versions": results.versions,
        **results.options,
    }
    try:
        (out / ROWS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"{out} cannot be written: {error.strerror}.") from error
    store = RowStore(out / ROWS, conditions, results.calibrations)
    store.check()
    return store


def _make_rows(context: ComparisonContext, results: Results) -> None:
    """Fill in the rows, and what a search for the tolerance found; say what was left out."""
    asked = context.asked
    try:
        results.rows = [context.dense_row()]
        for cell in asked.cells:
            row = context.row(cell, context.draws[0])
            results.rows.append(row)
            results.rows += recovered_rows(context, row, results.not_timed)
            if cell.calibrated:
                results.rows += [context.row(cell, draw) for draw in context.draws[1:]]
        if asked.tolerance is not None:
            reached, made = search_tolerance(context, asked.cells, results.table, asked.tolerance)
            results.rows += made
            results.tolerance = {"share": asked.tolerance, "found": list(map(asdict, reached))}
    finally:
        (context.out / HIDDEN).unlink(missing_ok=True)
    results.notes += filter(None, [bos_note(context.dense, context.reader)])
    context.in_bits(results.rows)
    ranked = [row for row in results.rows if not row.searched]
    rank(ranked)
    rank_at_equal_bytes(ranked)


def _write(context: ComparisonContext, results: Results) -> None:
    """Write the results, then have the rows answer tasks and be timed, and write all of it."""
    out = context.out
    write_whole(out / "results.json", results.json())
    answer_rows(context, results.table)
    results.not_timed |= time_rows(context, results.table)
    write_whole(out / "results.json", results.json())
    write_report(results, out)
