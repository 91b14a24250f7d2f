"""The grid: every method with every pattern on the same model, the same calibration tokens, the same metric.

Each row is pruned, evaluated and kept in `OUT/rows/` as soon as it is finished, with the conditions it was
measured under; the same command again computes only what is missing. A folder whose rows were measured under
other conditions is refused, and so is nothing else: there is no way to put two conditions into one table.

Rows are ranked by perplexity within one pattern only, so that kinds of sparsity are never ranked against each
other, and two rows whose paired difference has a 95 % interval that contains zero are a tie.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint import file_sha256, open_checkpoint, resolve
from secateur.data import evaluation_windows, load_tokenizer
from secateur.decide import check_method, way_through
from secateur.errors import BadPattern, OutputRefused, SecateurError, UnknownName
from secateur.evaluate import Forward
from secateur.footprint import check_passes
from secateur.formats.packed import VALUES
from secateur.latency import time_rows
from secateur.machine import machine, versions
from secateur.methods import find_method
from secateur.model import load
from secateur.options import (
    calibration_dtype,
    check_windows,
    default_corpus,
    default_length,
    draw_calibration,
    find_devices,
    find_dtype,
    find_size,
    forward_dtype,
)
from secateur.patterns import parse
from secateur.plan import ALLOCATIONS, check_allocation
from secateur.progress import Progress
from secateur.prune import prune_checkpoint
from secateur.ranking import rank
from secateur.report import write_report
from secateur.restack import spill_folder
from secateur.results import SCHEMA, Results, row_name
from secateur.rows import dense_row, pruned_row, rounded_row
from secateur.runtimes import find_runtime
from secateur.shrink import refuse_structure
from secateur.store import CHECKPOINTS, RowStore, file_name, write_whole
from secateur.structures import Structure
from secateur.trial import site_shapes


def compare(
    model: str | Path | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] = ("magnitude", "wanda", "sparsegpt"),
    patterns: Sequence[str] = ("50%", "4:8", "2:4"),
    allocate: Sequence[str] = ("uniform",),
    values: Sequence[str] = ("as stored",),
    bench: Sequence[str] = (),
    bench_dtype: str = "bfloat16",
    align: int | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    samples: int = 128,
    windows: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    passes: str = "auto",
    memory: str | int | None = None,
    data_dir: str | Path | None = None,
    restart: bool = False,
    allow_low_coverage: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Prune and evaluate `model` with every method and pattern; write `results.json` and `report.md` to `out`.

    `allocate` lists rules as `prune` knows them; each makes a row of its own. So does each of `values` for a pattern of
    zeros: `as stored`, or `int8`, what is kept rounded to eight bits and packed. `bench` lists runtimes in which the
    finished rows are timed beside the dense model, in `bench_dtype`. The other arguments are as for `prune` and
    `evaluate`. The pruned checkpoints stay in `out/checkpoints`. Raises SecateurError; ConditionsDiffer where `out`
    holds rows of another model, text or metric. After a killed run the same call computes only what is missing.
    """
    progress, out = progress or Progress(), Path(out)
    for name in values:
        if name not in VALUES:
            raise UnknownName("kind of values", name, VALUES)
    for name in bench:
        find_runtime(name)
    check_passes(passes)
    limit = find_size(memory)
    grid = _grid(methods, patterns, allocate, skip, align)
    chosen, dtype = find_devices(device)[0], find_dtype(dtype)
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    language_model = load(
        folder, trust_remote_code=trust_remote_code, spill=spill_folder(out / "dense.hidden", source.bytes, limit)
    )  # fmt: skip
    for structure in {pattern: parse(pattern) for _, pattern, _ in grid}.values():
        if isinstance(structure, Structure):
            refuse_structure(language_model, structure, source.bytes, align, chosen)
    length = seq_len or default_length(language_model)
    calibrated = draw_calibration(
        language_model, folder, model, calibration, samples=samples, seq_len=length, seed=seed, data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    judged = evaluation_windows(
        load_tokenizer(folder, trust_remote_code=trust_remote_code), default_corpus(model, evaluation, "wikitext2"),
        length=length, windows=windows, data_dir=Path(data_dir) if data_dir else None,
    )  # fmt: skip
    check_windows(language_model, judged, batch_size)
    results = Results(
        SCHEMA,
        {
            "name": str(model or "demo"),
            "parameters": language_model.model.num_parameters(),
            "shards": source.sha256(),
        },
        calibrated.fingerprint(), judged.fingerprint(), machine(), versions(),
        list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]], [],
    )  # fmt: skip
    calibrating = calibration_dtype(dtype, chosen, language_model.model.dtype)
    if passes == "auto":  # the same for all rows: one where that fits for each
        ways = (
            way_through(
                language_model, calibrated.ids.shape, find_method(method), method, site_shapes(language_model),
                passes=passes, limit=limit, dtype=calibrating, device=chosen,
                devices=len(find_devices(device)), batch_size=batch_size,
            )["passes"]
            for method in {method for method, pattern, _ in grid if not isinstance(parse(pattern), Structure)}
        )  # fmt: skip
        passes = "two" if "two" in ways else "one"
    options = {
        "passes": passes,
        "config": file_sha256(folder / "config.json"),
        "dtype": str(forward_dtype(dtype, chosen)),
        "calibration dtype": str(calibrating),
        "device": chosen.type,
        "skip": list(skip),
        **({"align": align} if align else {}),
        "batch_size": batch_size,
    }
    conditions = _conditions(results, options)
    try:
        (out / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"{out} cannot be written: {error.strerror}.") from error
    store = RowStore(out / "rows", conditions)
    store.check()

    dense = Forward(
        language_model, judged.ids, chosen, forward_dtype(dtype, chosen), batch_size, spill=out / "dense.hidden"
    )  # fmt: skip
    try:
        row, measured = store.get(row_name("dense", "-")) or dense_row(source, dense, progress)
        store.put(row, measured)
        rows = {row.name: (row, measured)}
        for method, pattern, rule in grid:
            kept = store.get(row_name(method, pattern, rule))
            if kept is None:
                place = out / CHECKPOINTS / file_name(row_name(method, pattern, rule))
                report = prune_checkpoint(
                    source, language_model, calibrated, place, method=method, pattern=pattern, allocate=rule,
                    align=align if isinstance(parse(pattern), Structure) else None, skip=skip, device=device,
                    dtype=dtype, batch_size=batch_size, passes=passes, memory=limit, overwrite=True, restart=restart,
                    allow_low_coverage=allow_low_coverage,
                    trust_remote_code=trust_remote_code, command=results.command, progress=progress,
                )  # fmt: skip
                kept = pruned_row(report, place, dense, measured, trust_remote_code, progress)
                kept[0].checkpoint = str(place.relative_to(out))
                store.put(*kept)
            rows[kept[0].name] = kept
            if "int8" in values and kept[0].kind != "structured":
                name = row_name(method, pattern, rule, "int8")
                rounded = store.get(name)
                rounded = rounded or rounded_row(kept[0], out, dense, measured, trust_remote_code, progress)
                store.put(*rounded)
                rows[name] = rounded
    finally:
        (out / "dense.hidden").unlink(missing_ok=True)
    rank({name: (row, found.loss) for name, (row, found) in rows.items()})
    results.rows = [row for row, _ in rows.values()]
    write_whole(out / "results.json", results.json())
    if bench:
        results.not_timed = time_rows(results.rows, folder, out, bench, bench_dtype, progress)
    write_whole(out / "results.json", results.json())
    write_report(results, out)
    progress.end()
    return results


def _grid(
    methods: Sequence[str], patterns: Sequence[str], allocate: Sequence[str], skip: Sequence[str], align: int | None
) -> list[tuple[str, str, str]]:
    """(method, pattern, rule) of every row: each method with the patterns of its kind, zeros or structures.

    Raises UnknownName or BadPattern for a method that goes with none of the patterns, or a pattern with none of the
    methods; and whatever `check_method` raises for the options.
    """
    if not methods or not patterns:
        raise BadPattern("A comparison wants at least one method and one pattern.")
    grid: list[tuple[str, str, str]] = []
    refused: dict[str, SecateurError] = {}
    for pattern in patterns:
        wanted = parse(pattern)
        for method in methods:
            try:
                check_method(method, pattern)
            except (UnknownName, BadPattern) as error:
                refused[method] = refused[pattern] = error
                continue
            structure = isinstance(wanted, Structure)
            rules = [rule for rule in allocate if rule == "uniform"] or allocate if structure else allocate
            for rule in rules:
                check_method(method, pattern, rule, skip, align if structure else None)
                if rule not in ("uniform", *ALLOCATIONS):
                    check_allocation(rule, str(wanted), files=False)
                grid.append((method, str(wanted), rule))
    fitting = {method for method, _, _ in grid} | {pattern for _, pattern, _ in grid}
    for asked, named in [*((m, m) for m in methods), *((p, str(parse(p))) for p in patterns)]:
        if named not in fitting:
            raise refused[asked]
    return grid


def _conditions(results: Results, options: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two rows to stand in one table."""
    return {
        "schema": results.schema,
        "model": results.model["shards"],
        "calibration": results.calibration,
        "evaluation": results.evaluation,
        "versions": results.versions,
        **options,
    }
