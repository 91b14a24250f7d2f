"""The rows of a comparison, timed: each pruned checkpoint beside the dense model, in every runtime
that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.deployment.bench import BenchResults, Timing, bench
from secateur.deployment.runtimes import RUNTIMES
from secateur.errors import UnsupportedModel
from secateur.evaluation.results.schema import Row
from secateur.system.progress import Progress
from secateur.system.settings import TimedRows


def time_rows(
    rows: Sequence[Row], dense: Path, out: Path, timed: TimedRows, progress: Progress
) -> dict[str, str]:
    """Fill in `latency` of the rows; returns what could not be timed, with the reasons.

    A pruned folder is timed with the dense model in turn, one after the other, so that no more than
    two models are in memory for each runtime. A row with rounded values gets what runtimes that
    round took, others the rest.
    """
    skipped: dict[str, str] = {}
    stored = {row.name: row for row in rows if row.checkpoint and row.values == "as stored"}
    for row in stored.values():
        assert row.checkpoint is not None
        try:
            found = bench(
                [out / row.checkpoint],
                dense=dense,
                runtimes=timed.bench,
                dtype=timed.bench_dtype,
                progress=progress,
            )
        except (
            UnsupportedModel
        ) as error:  # other outputs than plain transformers': no figure, but the row stands
            skipped[row.name] = str(error)
            continue
        skipped |= {
            f"{row.name}: {what}": why
            for what, why in found.skipped.items()
            if not what.startswith("dense in")
        }
        dense_rows = [other for other in rows if other.kind == "dense" and not other.latency]
        bare = replace(row, values="as stored").name
        pruned_rows = [other for other in rows if replace(other, values="as stored").name == bare]
        for timing in found.timings:
            rounded = RUNTIMES[timing.runtime].rounded
            alike = [other for other in pruned_rows if (other.values == "int8") == rounded]
            if timing.model != "dense" and not alike:
                skipped[f"{row.name} in {timing.runtime}"] = (
                    "no row has int8 values; add --values 'as stored,int8'"
                )
            for target in dense_rows if timing.model == "dense" else alike:
                target.latency.append(_entry(timing, found))
    return skipped


def _entry(timing: Timing, found: BenchResults) -> dict[str, Any]:
    """What `results.json` holds of one timing."""
    held = {key: value for key, value in asdict(timing).items() if key != "model"}
    return held | {"dtype": found.dtype, "new_tokens": found.new_tokens, "rounds": found.rounds}
