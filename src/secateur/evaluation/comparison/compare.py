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

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows, evaluation_windows, load_tokenizer
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
from secateur.evaluation.perplexity import Forward
from secateur.evaluation.report.write import write_report
from secateur.evaluation.results.ranking import rank
from secateur.evaluation.results.schema import SCHEMA, Results, find_tolerance
from secateur.evaluation.tasks.answer import check_tasks
from secateur.methods import find_method
from secateur.methods.patterns import parse
from secateur.methods.structures import Structure
from secateur.models.context import check_windows, default_corpus, default_length
from secateur.models.load import load, resolve
from secateur.models.mapped_experts import spill_folder
from secateur.models.matrices import matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.pruning.opening import draw_calibration
from secateur.pruning.planning.memory import check_passes, way_through
from secateur.pruning.structured.program import refuse_structure
from secateur.recovery.checks import check_way
from secateur.recovery.job import BATCH_SIZE
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
    Trust,
    ZeroShot,
)
from secateur.system.sizes import find_size


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
    """Prune and evaluate `model` with every method and pattern; write `results.json`, `report.html`
    and `report.md`.

    `patterns` may hold ranges (`10%..80%`). `allocate` lists rules as `prune` knows them; each
    makes a row of its own. So does each of `values` for a pattern of zeros: `as stored`, or `int8`,
    what is kept rounded to eight bits and packed. With several `samples`, seeds or texts, every row
    is made for every draw of them: the table has the first text, most samples and first seed, the
    others say how much hangs on the draw. `recover`: ways of `recover`, by each of which every
    pruned row of the table is fine-tuned for `recover_steps` steps on `recover_text` (default: as
    there), of which no window overlaps calibration or evaluation text; a row each, that says what
    it took. `tolerance`: for every method, the largest share whose perplexity is no more above the
    dense one than that. `tasks`: zero-shot tasks that the rows of the table answer, all of their
    items or the first `limit`. `bench` lists runtimes in which the finished rows are timed beside
    the dense model, in `bench_dtype`. The other arguments are as for `prune` and `evaluate`. The
    pruned checkpoints of the table stay in `out/checkpoints`. Raises SecateurError;
    ConditionsDiffer where `out` holds rows of another model, text or metric. After a killed run the
    same call computes only what is missing.
    """
    progress, out = progress or Progress(), Path(out)
    for name in values:
        if name not in VALUES:
            raise UnknownName("kind of values", name, VALUES)
    for name in bench:
        find_runtime(name)
    for way in recover:
        check_way(way, "the dense model")
    check_passes(passes)
    room, share, local = (
        find_size(memory),
        find_tolerance(tolerance),
        Path(data_dir) if data_dir else None,
    )
    check_tasks(tasks, local, limit)
    texts: list[str | None] = (
        [calibration] if calibration is None or isinstance(calibration, str) else [*calibration]
    )
    wanted = _draws(texts, samples, seed)
    grid = cells(methods, patterns, allocate, skip, align)
    if share is not None:
        check_searched(grid)
    chosen, dtype = find_devices(device)[0], find_dtype(dtype)
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    language_model = load(
        folder,
        trust_remote_code=trust_remote_code,
        spill=spill_folder(out / "dense.hidden", source.bytes, room),
    )
    for structure in {cell.pattern: parse(cell.pattern) for cell in grid}.values():
        if isinstance(structure, Structure):
            refuse_structure(language_model, structure, source.bytes, align, chosen)
    length = seq_len or default_length(language_model)
    trust = Trust(allow_low_coverage=allow_low_coverage, trust_remote_code=trust_remote_code)
    draws = [
        Draw(
            number,
            draw_calibration(
                language_model,
                folder,
                model,
                CalibrationText(
                    calibration=text, samples=count, seq_len=length, seed=start, data_dir=data_dir
                ),
                trust,
            ),
            texts.index(text),
        )
        for number, (text, count, start) in enumerate(wanted)
    ]
    judged = evaluation_windows(
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        default_corpus(model, evaluation, "wikitext2"),
        length=length,
        windows=windows,
        data_dir=local,
    )
    check_windows(language_model, judged, batch_size)
    calibrating = calibration_dtype(dtype, chosen, language_model.model.dtype)
    compute = Compute(passes=passes, memory=room, batch_size=batch_size)
    passes = _passes(
        RowStore(out / "rows", {}, []).recorded("passes"),
        language_model,
        draws[0].windows,
        grid,
        compute,
        calibrating,
        [chosen] * len(find_devices(device)),
    )
    results = Results(
        SCHEMA,
        {
            "name": str(model or "demo"),
            "parameters": language_model.model.num_parameters(),
            "shards": source.sha256(),
            "config": file_sha256(folder / "config.json"),
        },
        [draw.windows.fingerprint() for draw in draws],
        judged.fingerprint(),
        {
            "passes": passes,
            "dtype": str(forward_dtype(dtype, chosen)),
            "calibration dtype": str(calibrating or language_model.model.dtype),
            "device": chosen.type,
            "skip": list(skip),
            **({"align": align} if align else {}),
            "batch_size": batch_size,
        },
        machine(),
        versions(),
        typed_command(command),
        [],
    )
    recovering = _recovering(
        recover,
        recover_steps,
        recover_text,
        model,
        folder,
        language_model,
        [judged, *(draw.windows for draw in draws)],
        data_dir=local,
        device=chosen,
        restart=restart,
        command=results.command,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    store = _store(out, results)
    dense = Forward(
        language_model,
        judged.ids,
        chosen,
        forward_dtype(dtype, chosen),
        batch_size,
        spill=out / "dense.hidden",
    )
    ground = ComparisonContext(
        source,
        dense,
        out,
        store,
        draws,
        Recipe(skip=skip, align=align),
        Compute(device=device, dtype=dtype, batch_size=batch_size, passes=passes, memory=room),
        Destination(out=out, overwrite=True, restart=restart, command=results.command),
        trust,
        progress,
    )
    try:
        results.rows = [ground.dense_row()]
        for cell in grid:
            row = ground.row(cell, draws[0])
            results.rows.append(row)
            if "int8" in values and not cell.structured:
                try:
                    results.rows.append(ground.rounded(row))
                except UnsupportedModel as error:  # too few zeros to pack
                    results.not_timed[cell.name("int8")] = str(error)
            if recovering:
                results.rows += ground.recovered(row, recovering, results.not_timed)
            results.rows += [ground.row(cell, draw) for draw in draws[1:] if cell.calibrated]
        if share is not None:
            found, made = reaches(ground, grid, results.table, share)
            results.rows += made
            results.tolerance = {"share": share, "found": [asdict(reach) for reach in found]}
    finally:
        (out / "dense.hidden").unlink(missing_ok=True)
    rank([row for row in results.rows if not row.searched])
    write_whole(out / "results.json", results.json())
    if tasks:
        answer_rows(
            results.table,
            folder,
            out,
            tasks,
            limit=limit,
            data_dir=local,
            batch_size=batch_size,
            device=chosen,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if bench:
        results.not_timed |= time_rows(results.table, folder, out, bench, bench_dtype, progress)
    write_whole(out / "results.json", results.json())
    write_report(results, out)
    progress.end()
    return results


def _recovering(
    ways: Sequence[str],
    steps: int,
    text: str | None,
    model: str | Path | None,
    folder: Path,
    language_model: LanguageModel,
    avoid: Sequence[Windows],
    *,
    data_dir: Path | None,
    **options: Any,
) -> Recovering | None:
    """How rows are recovered, with the text for it; None where they are not. Raises
    NotEnoughText.
    """
    if not ways:
        return None
    windows = recovery_windows(
        load_tokenizer(folder, trust_remote_code=options["trust_remote_code"]),
        default_corpus(model, text, "c4"),
        count=steps * BATCH_SIZE,
        length=avoid[0].ids.shape[1],
        seed=avoid[1].seed or 0,
        avoid=[one.ids for one in avoid],
        data_dir=data_dir,
    )
    check_windows(language_model, windows, BATCH_SIZE)
    return Recovering(list(dict.fromkeys(ways)), steps, windows, language_model, folder, **options)


def _draws(
    texts: Sequence[str | None], samples: int | Sequence[int], seed: int | Sequence[int]
) -> list[tuple[str | None, int, int]]:
    """(text, samples, seed) of every draw, the one of the table first: of the first text, most
    samples, first seed.
    """
    counts = [samples] if isinstance(samples, int) else list(dict.fromkeys(samples))
    seeds = [seed] if isinstance(seed, int) else list(dict.fromkeys(seed))
    if not texts or not counts or not seeds:
        raise BadPattern(
            "A comparison wants at least one calibration text, one number of samples and one seed."
        )
    return list(product(dict.fromkeys(texts), sorted(counts, reverse=True), seeds))


def _passes(
    recorded: str | None,
    language_model: LanguageModel,
    calibrated: Windows,
    grid: Sequence[Cell],
    compute: Compute,
    forward: torch.dtype | None,
    devices: Sequence[torch.device],
) -> str:
    """How often blocks run, the same for all rows: once where that fits for each."""
    if compute.passes != "auto":
        return compute.passes
    if recorded is not None:  # what is free changes, and rows that are there must go on as they are
        return recorded
    shape, shapes = calibrated.ids.shape, matrix_shapes(language_model)
    methods = dict.fromkeys(cell.method for cell in grid if not cell.structured)
    ways = (
        way_through(language_model, shape, find_method(method), shapes, compute, forward, devices)[
            "passes"
        ]
        for method in methods
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
