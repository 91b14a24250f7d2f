"""Comparisons with made-up figures, where the right answer is known, and the demo's real one."""

from __future__ import annotations

import json
from typing import Any

from secateur.evaluation.results.schema import SCHEMA, Results, Row
from support.paths import ROOT

DENSE = 20.0
"""The dense perplexity of `table`: 1 is 5 %."""
BENCH = ROOT / "bench" / "results" / "compare-bench-demo.json"
MACHINE = {
    "processor": "AMD EPYC", "cores": 2, "threads": 2, "megahertz": [], "memory_bytes": 2**34, "system": "Linux x86_64",
    "accelerators": [],
}  # fmt: skip


def row(method: str, pattern: str, kind: str, delta: float, half: float = 0.1, **more: Any) -> Row:
    """A row that adds `delta` ± `half` to the dense perplexity; as large as the dense one unless said otherwise."""
    more = {"disk_bytes": 1000, "parameters": 500, "checkpoint": f"checkpoints/{method}-{pattern}"} | more
    return Row(
        method, pattern, kind, 0.5, DENSE + delta, delta, (delta - half, delta + half), 0.1, 0.8, {"solve": 1.0}, None,
        **more,
    )  # fmt: skip


def timed(
    runtime: str, ratio: float, spread: float = 0.05, *, over: float | None = None, against: str | None = None,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A latency entry: so many times as fast as the dense model in `against`, ± `spread`."""
    over = ratio if over is None else over
    return {
        "runtime": runtime, "dtype": "float32", "batch": 1, "prompt": 128, "new_tokens": 32, "rounds": 8,
        "prefill": [0.01, 0.02, 0.03], "decode": [0.009 / over, 0.01 / over, 0.011 / over], "tokens_per_second": 100.0,
        "against": against or runtime, "prefill_ratio": [1.0, 0.9, 1.1],
        "decode_ratio": [ratio, ratio - spread, ratio + spread], "over_eager": [over, over - spread, over + spread],
        "memory_bytes": 900, "weight_bytes": 800, "share_of_bandwidth": 0.1, "share_of_matrix_rate": 0.1, **more,
    }  # fmt: skip


def table(*rows: Row, dense: list[dict[str, Any]] | None = None, draws: int = 1, **more: Any) -> Results:
    """A comparison of these rows with the dense model, which was timed as `dense` says, on so many draws of a text."""
    plain = Row(
        "dense", "-", "dense", 0.0, DENSE, 0.0, (0.0, 0.0), 0.0, 1.0, {"solve": 0.0}, None, 1000, parameters=500,
        latency=dense or [],
    )  # fmt: skip
    more = {"machine": MACHINE, "command": ["secateur", "compare", "some/model", "--out", "out/here"]} | more
    text = {"source": "c4", "split": "train", "samples": 8, "length": 64, "seed": 0, "sha256": "0"}
    texts = [{**text, "seed": seed} for seed in range(draws)]
    return Results(
        schema=SCHEMA, model={"name": "some/model", "parameters": 500, "shards": {}}, calibrations=texts,
        evaluation={**text, "samples": 40, "seed": None}, options={}, versions={}, rows=[plain, *rows], **more,
    )  # fmt: skip


def demo_results() -> Results:
    """What was measured on the demo model, schema 2, as schema 3 has it."""
    held = json.loads(BENCH.read_text(encoding="utf-8"))
    text, lines = held.pop("calibration"), held.pop("rows")
    rows = [Row(**{**line, "delta_interval": tuple(line["delta_interval"])}) for line in lines]
    return Results(**{**held, "schema": SCHEMA}, calibrations=[text], options={}, rows=rows)
