"""What a short fine-tune wins back on the demo model, by each way, at one token budget.

    python bench/recover.py --steps 300 --json bench/results/recover.json

The best one-shot method (`best`) prunes the demo model, or another, to each pattern; all ways see the same windows of
training text. Perplexity before and after with paired 95 % intervals, CPU-seconds, and the share of the added
perplexity that is won back. Each recovery resumes where it was, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

from common import options, write

import secateur
from secateur.data.demo import model_folder
from secateur.recovery.recover import recover
from secateur.system.progress import show


def judged(folder: Path, chosen: Namespace) -> dict[str, Any]:
    """Perplexity of a checkpoint on the evaluation text, beside the dense model's."""
    found = asdict(secateur.evaluate(folder, dense=chosen.model, evaluation=chosen.evaluation, windows=chosen.windows))
    return {key: found[key] for key in ("perplexity", "dense_perplexity", "delta", "delta_interval", "kl")}


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(model=(str(model_folder()), "default: the demo model"), calibration="demo"),
        dict(text="demo", evaluation="demo", patterns="2:4,70%,25% of channels", method="best"),
        dict(ways="lora,masked,distill,blocks", steps=360, batch_size=(4, "windows in a step")),
        dict(seq_len=(512, "tokens of a window; it is judged on the model's own"), windows=128),
        dict(out=Path("out/recover"), json=Path),
    )
    rows: list[dict[str, Any]] = []
    for pattern in chosen.patterns.split(","):
        own = None if chosen.evaluation == "demo" else chosen.evaluation  # the demo's parts do not overlap
        place = chosen.out / pattern.replace("%", "pct").replace(":", "of").replace(" ", "-")
        if not (place / "pruned").exists():
            secateur.prune(
                chosen.model, out=place / "pruned", method=chosen.method, pattern=pattern,
                calibration=chosen.calibration, progress=show(quiet=False),
            )  # fmt: skip
        before = judged(place / "pruned", chosen)
        rows.append({"pattern": pattern, "way": "one-shot", **before})
        for way in chosen.ways.split(","):
            if not (place / way).exists():
                started = process_time()
                done = recover(
                    place / "pruned", out=place / way, dense=chosen.model, way=way, steps=chosen.steps,
                    batch_size=chosen.batch_size, seq_len=chosen.seq_len, text=chosen.text, evaluation=own,
                    command=["python", *sys.argv], progress=show(quiet=False),
                )  # fmt: skip
                spent = {"tokens": done.tokens, "rate": done.rate, "seconds": done.seconds}
                spent["cpu_seconds"] = process_time() - started  # of the last run, where it was interrupted
                (place / f"{way}.json").write_text(json.dumps(spent))
            after = judged(place / way, chosen)
            won = 1 - after["delta"] / before["delta"]
            spent = json.loads((place / f"{way}.json").read_text())
            rows.append({"pattern": pattern, "way": way, **after, **spent, "won_back": won})
            print(json.dumps(rows[-1]), flush=True)
            write(chosen.json, command=sys.argv, steps=chosen.steps, rows=rows)
    print(json.dumps({f"{row['pattern']} {row['way']}": row["won_back"] for row in rows if "won_back" in row}))
