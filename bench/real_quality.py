"""How much of what SparseGPT loses on a real model other methods win back, and for how much of its time.

    python bench/real_quality.py out/real/SmolLM2-135M-Instruct.Q4_1.gguf --data-dir DIR --json FILE

Calibrated on C4, judged on WikiText-2's test split in windows of 512 tokens (`bench/real.py` fetches the model). Every
row comes from `secateur compare`, which keeps it in --out: the same command goes on where it was killed, and other
methods join the table. Without a model it is the demo model with its own text. `removed` is the share of what SparseGPT
adds to the dense model that a row does not add, in perplexity and in KL; `cost` its seconds over SparseGPT's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import parser, write

KEPT = ("method", "pattern", "perplexity", "delta", "delta_interval", "kl", "kl_interval", "rank")


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a row, beside SparseGPT's of the same pattern."""
    base = next(one for one in rows if (one["method"], one["pattern"]) == ("sparsegpt", row["pattern"]))
    seconds, of_base = (sum(one["seconds"].values()) for one in (row, base))
    return {name: row.get(name) for name in KEPT} | {
        "seconds": seconds,
        "cost": seconds / of_base,
        "removed": 1 - row["delta"] / base["delta"],
        "removed_kl": 1 - row["kl"] / base["kl"],
    }


def main() -> None:
    read = parser(
        __doc__,
        {
            "data_dir": Path,
            "out": Path("out/real-quality"),
            "methods": "sparsegpt,default,best",
            "patterns": "50%,2:4",
            "samples": 32,
            "seq_len": 512,
            "windows": 24,
        },
        {"json": Path},
    )
    read.add_argument("model", nargs="?")
    given = read.parse_args()
    command = [
        "compare",
        *([given.model] if given.model else []),
        "--methods",
        given.methods,
        "--patterns",
        given.patterns,
    ]
    command += ["--samples", str(given.samples), "--seq-len", str(given.seq_len), "--windows", str(given.windows)]
    if given.data_dir:
        command += ["--calibration", "c4", "--evaluation", "wikitext2", "--data-dir", str(given.data_dir)]
    subprocess.run([sys.executable, "-m", "secateur", *command, "--out", str(given.out)], check=True)
    table = json.loads((given.out / "results.json").read_text())
    pruned = [row for row in table["rows"] if row["pattern"] and row["delta"]]
    lines = [line(row, pruned) for row in pruned]
    for one in lines:
        print(
            f"{one['method']:24} {one['pattern']:4} {one['perplexity']:8.2f}  KL {one['kl']:.4f}  removed "
            f"{one['removed']:4.0%} ({one['removed_kl']:4.0%})  cost {one['cost']:5.1f}"
        )
    kept = {key: table[key] for key in ("evaluation", "calibrations", "model")}
    write(given.json, command=sys.argv, **kept, rows=lines)


if __name__ == "__main__":
    main()
