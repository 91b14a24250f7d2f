"""How much of what SparseGPT loses on a real model other methods win back, and for how much of its time.

    python bench/real_quality.py --samples 128 --methods sparsegpt,default,default+distil --json FILE

The model and the texts are those of bench/real.py, which fetches what is missing: SmolLM2-135M-Instruct, C4 to
calibrate on, WikiText-2's test split in windows of 512 tokens to judge on. Every row comes from `secateur compare`,
which keeps it in --out: the same command goes on where it was killed, and other methods join the table. `removed` is
the share of what SparseGPT adds to the dense model that a row does not add, in perplexity and in KL; `cost` its seconds
over SparseGPT's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import options, write
from real import model_file, texts

KEPT = ("method", "pattern", "perplexity", "delta", "delta_interval", "kl", "rank")


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a row, beside SparseGPT's of the same pattern."""
    base = next(one for one in rows if (one["method"], one["pattern"]) == ("sparsegpt", row["pattern"]))
    seconds, of_base = (sum(one["seconds"].values()) for one in (row, base))
    return {name: row[name] for name in KEPT} | {
        "seconds": seconds,
        "cost": seconds / of_base,
        "removed": 1 - row["delta"] / base["delta"],
        "removed_kl": 1 - row["kl"] / base["kl"],
    }


def main() -> None:
    given = options(
        __doc__,
        {
            "data_dir": (Path, "a folder with local copies of c4 and wikitext2"),
            "folder": (Path("out/real"), "where the model lies"),
            "out": Path("out/real-quality"),
            "methods": "sparsegpt,default,best",
            "patterns": "50%,2:4",
            "samples": 32,
            "seq_len": 512,
            "windows": 24,
        },
        {"json": Path},
    )
    command = ["compare", str(model_file(given.folder)), *texts(given.data_dir), "--methods", given.methods]
    command += ["--patterns", given.patterns, "--samples", str(given.samples), "--seq-len", str(given.seq_len)]
    command += ["--windows", str(given.windows)]
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
