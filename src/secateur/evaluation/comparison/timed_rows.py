"""The rows of a comparison, timed: each pruned checkpoint beside the dense model, in every runtime
that has it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from secateur.deployment.bench import BenchResults, Timing, bench
from secateur.deployment.runtimes import RUNTIMES, runs_values
from secateur.errors import UnsupportedModel
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row


def time_rows(context: ComparisonContext, rows: Sequence[Row]) -> dict[str, str]:
    """Fill in `latency` of the rows; returns what could not be timed, with the reasons.

    A pruned folder is timed with the dense model in turn, one after the other, so that no more than
    two models are in memory for each runtime. A row with values on a grid runs where a runtime
    rounds to them, others in the rest.
    """
    skipped: dict[str, str] = {}
    timed = context.asked.timed
    for row in rows if timed.bench else ():
        runtimes = [name for name in timed.bench if runs_values(RUNTIMES[name], row.values)]
        if not row.checkpoint or not runtimes:
            continue
        try:
            results = bench(
                [context.out / row.checkpoint],
                dense=context.source.folder,
                runtimes=runtimes,
                dtype=timed.bench_dtype,
                trust_remote_code=context.asked.trust.trust_remote_code,
                progress=context.asked.progress,
            )
        except UnsupportedModel as error:
            # other outputs than plain transformers': no figure, but the row stands
            skipped[row.name] = str(error)
            continue
        skipped |= {
            f"{row.name}: {what}": why
            for what, why in results.skipped.items()
            if not what.startswith("dense in")
        }
        dense_rows = [other for other in rows if other.kind == "dense"]
        for timing in results.timings:
            for target in dense_rows if timing.model == "dense" else [row]:
                if all(entry["runtime"] != timing.runtime for entry in target.latency):
                    target.latency.append(_entry(timing, results))
    for name in timed.bench:
        if RUNTIMES[name].rounded and not any(runs_values(RUNTIMES[name], r.values) for r in rows):
            skipped[name] = (
                f"no row has values that it runs; add --values '{RUNTIMES[name].rounded}'"
            )
    return skipped


def _entry(timing: Timing, results: BenchResults) -> dict[str, Any]:
    """What `results.json` holds of one timing."""
    entry = {key: value for key, value in asdict(timing).items() if key != "model"}
    return entry | {
        "dtype": results.dtype,
        "new_tokens": results.new_tokens,
        "rounds": results.rounds,
    }
