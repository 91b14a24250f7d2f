"""What a short fine-tune wins back on the demo model, by each way, at one token budget.

    python bench/recover.py --steps 300 --json bench/results/recover.json

The best one-shot method (`best`) prunes the demo model, or another, to each pattern; all ways see the same windows of
training text. Perplexity before and after with paired 95 % intervals, CPU-seconds, and the share of the added
perplexity that is won back. Each recovery resumes where it was, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import secateur
from secateur.demo import model_folder
from secateur.machine import machine, versions
from secateur.progress import show
from secateur.recovery.recover import recover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_folder()), help="default: the demo model")
    for text in ("calibration", "text", "evaluation"):
        parser.add_argument(f"--{text}", default="demo")
    parser.add_argument("--patterns", default="2:4,70%,25% of channels")
    parser.add_argument("--method", default="best")
    parser.add_argument("--ways", default="lora,masked,distill,blocks")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window; it is judged on the model's own")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("out/recover"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
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
            if chosen.json:
                held = {"command": sys.argv, "machine": machine(), "versions": versions(), "steps": chosen.steps}
                chosen.json.write_text(json.dumps({**held, "rows": rows}, indent=1) + "\n")
    print(json.dumps({f"{row['pattern']} {row['way']}": row["won_back"] for row in rows if "won_back" in row}))


def judged(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a checkpoint on the evaluation text, beside the dense model's."""
    found = asdict(secateur.evaluate(folder, dense=chosen.model, evaluation=chosen.evaluation, windows=chosen.windows))
    return {key: found[key] for key in ("perplexity", "dense_perplexity", "delta", "delta_interval", "kl")}


if __name__ == "__main__":
    main()
