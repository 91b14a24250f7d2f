"""Prune, quantise, or both: rows at equal bytes, and what quantising costs.

    python bench/quantise.py --out out/quantise --json bench/results/quantise-demo.json

Without a model it is the demo model, calibrated on 32 windows of 512 tokens and judged on 32. With --model and
--data-dir, C4 and WikiText-2; --model random is the random Llama of 29 M weights of bench/prune.py, for its cost. The
tables come from `secateur compare`; finished rows are kept in --out, so the same command goes on where it was killed.
--parts: `bytes` (zeros × bits), `solvers` (each solver, three draws of the calibration text), `best` (the preset that
takes its time), `distil` (wants --samples 128), `cost` (CPU-seconds of `prune` with and without --values, --rounds runs
each in turn, one thread).
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import options, write
from prune import SMALL, write_inputs

GROUP = "of group 64"
"""128 divides neither the demo's 192 inputs nor SmolLM2's 576."""
TABLES: dict[str, list[str]] = {
    "bytes": [
        *("--methods", "default", "--patterns", "0%,50%,2:4,60%,75%"),
        *("--values", f"as stored,int8,int4 {GROUP},int3 {GROUP},int2 {GROUP}"),
    ],
    "solvers": [
        *("--methods", "default", "--patterns", "0%,50%", "--seeds", "0,1,2"),
        "--values",
        ",".join(f"int3 {GROUP}{by}" for by in ("", " by sweep", " by act-order", " by nearest", " by joint")),
    ],
    "distil": ["--methods", "default,default+distil", "--patterns", "50%", "--values", f"int4 {GROUP}"],
    "best": ["--methods", "best", "--patterns", "0%,50%,75%", "--values", f"int4 {GROUP},int3 {GROUP}"],
}
COSTS = {
    "default": ("50%", "as stored"),
    "default, int4": ("50%", f"int4 {GROUP}"),
    "plain int4": ("0%", f"int4 {GROUP}"),
}


def compared(part: str, model: list[str], text: list[str], out: Path) -> dict[str, Any]:
    """The results of a table."""
    command = [sys.executable, "-m", "secateur", "compare", *model, *text, *TABLES[part], "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "results.json").read_text())


def cpu_seconds(model: list[str], text: list[str], out: Path, pattern: str, values: str) -> float:
    """What one run of `prune` takes, all of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    chosen = ["--pattern", pattern, "--values", values, "--out", str(out), "--overwrite", "--restart"]
    subprocess.run([sys.executable, "-m", "secateur", "prune", *model, *text, *chosen], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def line(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row."""
    kept = ("method", "pattern", "values", "kind", "sparsity", "bits", "stored_as", "disk_bytes", "perplexity", "delta")
    kept += ("delta_interval", "kl", "calibration", "rank", "byte_rank", "byte_ties")
    return {name: row[name] for name in kept} | {"seconds": sum(row["seconds"].values())}


def main() -> None:
    given = options(
        __doc__,
        {
            "model": "",
            "data_dir": "",
            "out": Path("out/quantise"),
            "parts": "bytes,solvers,best,cost",
            "windows": 32,
            "samples": 32,
            "rounds": 3,
        },
        {"json": Path},
    )
    model, out = [given.model] if given.model else [], given.out
    if given.model == "random":
        out.mkdir(parents=True, exist_ok=True)
        write_inputs(SMALL, out, "bfloat16")
        model = [str(out / "model"), "--calibration", "demo"]
    drawn = ["--samples", str(given.samples), "--seq-len", "512"]
    judged = ["--windows", str(given.windows)]
    if given.data_dir:
        drawn += ["--calibration", "c4", "--data-dir", given.data_dir]
        judged += ["--evaluation", "wikitext2"]
    result: dict[str, Any] = {}
    for part in given.parts.split(","):
        if part in TABLES:
            table = compared(part, model, [*drawn, *judged], out)
            result[part] = [line(row) for row in table["rows"]]
            result |= {key: table[key] for key in ("evaluation", "calibrations", "model")}
        elif part == "cost":
            rounds = [
                {name: cpu_seconds(model, drawn, out / "cost", *how) for name, how in COSTS.items()}
                for _ in range(given.rounds)
            ]
            result[part] = {name: statistics.median(one[name] for one in rounds) for name in COSTS}
            result["ratio"] = statistics.median(one["default, int4"] / one["default"] for one in rounds)
            print(result[part], f"ratio {result['ratio']:.2f}")
    for part in TABLES:
        for row in result.get(part, []):
            print(
                f"{part:8} {row['method']:8} {row['pattern']:5} {row['values']:28} {row['bits']:6.3f} bits "
                f"{row['disk_bytes'] / 2**20:8.2f} MiB  {row['perplexity']:.3f}  KL {row['kl']:.4f}  {row['byte_rank']}"
            )
    write(given.json, command=sys.argv, **result)


if __name__ == "__main__":
    main()
