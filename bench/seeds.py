"""The same comparison with several calibration seeds: does a ranking hold, or was it the draw of the text?

    python bench/seeds.py --methods sparsegpt,default,best --patterns 70%,2:4 --json bench/results/quality-demo.json

Every seed is a `secateur compare` of its own in `out/seeds/NAME/SEED`, so an interrupted run goes on where it was. For
each row the table gives the added perplexity of every seed and their mean; a row is called better than the baseline
where, for every seed, the paired 95 % intervals of the two differences to the dense model do not overlap.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import options, save

import secateur
from secateur.system.progress import show


def run(chosen: Namespace) -> list[dict[str, Any]]:
    """The rows of every seed, with the seed in each."""
    rows = []
    for seed in map(int, chosen.seeds.split(",")):
        results = secateur.compare(
            chosen.model, out=Path("out/seeds") / chosen.name / str(seed), methods=chosen.methods.split(","),
            patterns=chosen.patterns.split(","), allocate=chosen.allocate.split(","), calibration=chosen.calibration,
            evaluation=chosen.evaluation, windows=chosen.windows, seq_len=chosen.seq_len, seed=seed,
            command=["python", *sys.argv], progress=show(quiet=False),
        )  # fmt: skip
        shared = {"model": results.model, "calibration": results.calibrations[0], "evaluation": results.evaluation}
        shared |= {"machine": results.machine, "versions": results.versions}
        rows += [{"seed": seed, **asdict(row), **(shared if row.kind == "dense" else {})} for row in results.rows]
    return rows


def table(rows: list[dict[str, Any]], baseline: str = "sparsegpt") -> list[str]:
    """Markdown: one line for each pattern and method, with the added perplexity of every seed."""
    seeds = sorted({row["seed"] for row in rows})
    keys = list(dict.fromkeys((r["pattern"], r["method"], r["allocation"]) for r in rows if r["kind"] != "dense"))
    order = list(dict.fromkeys(pattern for pattern, _, _ in keys))
    keys.sort(key=lambda key: order.index(key[0]))
    dense = {row["seed"]: row["perplexity"] for row in rows if row["kind"] == "dense"}
    lines = [
        f"Dense: {', '.join(f'{value:.4f}' for value in dense.values())} (seeds {', '.join(map(str, seeds))}).",
        "",
        f"| pattern | method | added perplexity by seed | mean | of {baseline}'s | KL | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for pattern, method, allocation in keys:
        mine = {
            r["seed"]: r for r in rows if (r["pattern"], r["method"], r["allocation"]) == (pattern, method, allocation)
        }
        base = {
            r["seed"]: r for r in rows if (r["pattern"], r["method"], r["allocation"]) == (pattern, baseline, "uniform")
        }
        mean = sum(r["delta"] for r in mine.values()) / len(mine)
        share = "" if base.keys() != mine.keys() else f"{mean * len(base) / sum(r['delta'] for r in base.values()):.0%}"
        if share and method != baseline:
            apart = all(mine[s]["delta_interval"][1] < base[s]["delta_interval"][0] for s in mine)
            share += ", better with every seed" if apart else ""
        by_seed = "; ".join(
            f"{r['delta']:+.3g} [{r['delta_interval'][0]:.3g}, {r['delta_interval'][1]:.3g}]" for r in mine.values()
        )
        kl = sum(r["kl"] for r in mine.values()) / len(mine)
        seconds = sum(sum(r["seconds"].values()) for r in mine.values()) / len(mine)
        name = method if allocation == "uniform" else f"{method} by {allocation}"
        lines.append(f"| {pattern} | {name} | {by_seed} | {mean:+.3g} | {share} | {kl:.4f} | {seconds:.0f} |")
    return lines


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(model=(str, "default: the embedded demo model")),
        dict(name=("demo", "the folder under out/seeds")),
        dict(methods="magnitude,wanda,sparsegpt,fast,default,best"),
        dict(patterns="50%,60%,70%,80%,4:8,2:4", allocate="uniform"),
        dict(baseline=("sparsegpt", "the method that the others are compared with")),
        dict(seeds="0,1,2", windows=128, seq_len=int, calibration=str, evaluation=str),
        dict(json=Path),
    )
    found = run(chosen)
    print("\n".join(table(found, chosen.baseline)))
    if chosen.json:
        save(chosen.json, {"command": sys.argv, "rows": found})  # whose rows say where they were measured
