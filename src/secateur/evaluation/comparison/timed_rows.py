"""The rows of a comparison, timed: each pruned checkpoint beside the dense model, in every runtime
that has it.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from secateur.deployment.bench import BenchResults, Timing, bench
from secateur.deployment.runtimes import RUNTIMES
from secateur.errors import UnsupportedModel
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row


def time_rows(context: ComparisonContext, rows: Sequence[Row]) -> dict[str, str]:
    """Fill in `latency` of the rows; returns what could not be timed, with the reasons.

    A pruned folder is timed with the dense model in turn, one after the other, so that no more than
    two models are in memory for each runtime. A row with rounded values gets what runtimes that
    round took, others the rest.
    """
    skipped: dict[str, str] = {}
    timed = context.asked.timed
    for row in rows if timed.bench else ():
        if not row.checkpoint or row.values != "as stored":
            continue
        try:
            results = bench(
                [context.out / row.checkpoint],
                dense=context.source.folder,
                runtimes=timed.bench,
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
        dense_rows = [other for other in rows if other.kind == "dense" and not other.latency]
        pruned_rows = [
            other for other in rows if replace(other, values="as stored").name == row.name
        ]
        for timing in results.timings:
            rounded = RUNTIMES[timing.runtime].rounded
            alike = [other for other in pruned_rows if (other.values == "int8") == rounded]
            if timing.model != "dense" and not alike:
                skipped[f"{row.name} in {timing.runtime}"] = (
                    "no row has int8 values; add --values 'as stored,int8'"
                )
            for target in dense_rows if timing.model == "dense" else alike:
                target.latency.append(_entry(timing, results))
    return skipped


def _entry(timing: Timing, results: BenchResults) -> dict[str, Any]:
    """What `results.json` holds of one timing."""
    entry = {key: value for key, value in asdict(timing).items() if key != "model"}
    return entry | {
        "dtype": results.dtype,
        "new_tokens": results.new_tokens,
        "rounds": results.rounds,
    }
