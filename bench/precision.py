"""What forward passes in bfloat16 change in quality, and what one pass through a block instead of two does.

    python bench/precision.py --json bench/results/precision.json

The same model, calibration windows and seed for all; every result is evaluated in float32 on the same windows. Of two
results the difference in perplexity is paired by window, with a 95 % interval; one that holds zero cannot be told from
no difference. An interval knows nothing of the calibration text, so what another draw of it does stands beside.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
from common import options, write

from secateur import prune_model
from secateur.data.calibration import calibration_windows
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import evaluation_windows
from secateur.evaluation.perplexity import Forward, Measured, measure, perplexity_difference
from secateur.models.load import load, resolve
from secateur.system.machine import CPU
from secateur.system.progress import Progress

WAYS = {"float32, two passes": ("float32", "two"), "float32": ("float32", "one"), "bfloat16": ("bfloat16", "one")}
AGAINST = {"float32": "float32, two passes", "bfloat16": "float32"}
"""What a way is compared with: one thing changes at a time. The first is compared with its own first seed."""


def losses(
    model: Path, method: str, pattern: str, seed: int, way: str, samples: int, windows: int, length: int
) -> Measured:
    """The loss of every evaluation window after pruning that way."""
    language_model, tokenizer = load(model), load_tokenizer(model)
    drawn = calibration_windows(tokenizer, "demo", samples=samples, length=length, seed=seed)
    dtype, passes = WAYS[way]
    prune_model(language_model, drawn, method=method, pattern=pattern, dtype=dtype, passes=passes, device="cpu")
    judged = evaluation_windows(tokenizer, "demo", length=length, windows=windows)
    return measure(Forward(language_model, judged.ids, CPU, torch.float32, 8), None, Progress())


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(model=(Path, "a folder; default: the demo model")),
        dict(methods="wanda,sparsegpt,default", patterns="50%,2:4", seeds=3, samples=128),
        dict(windows=256, length=512, json=Path),
    )
    model, rows = resolve(chosen.model), []
    for method, pattern in product(chosen.methods.split(","), chosen.patterns.split(",")):
        held: dict[str, Measured] = {}
        for seed, way in product(range(chosen.seeds), WAYS):
            found = losses(model, method, pattern, seed, way, chosen.samples, chosen.windows, chosen.length)
            held.setdefault("the first draw", found)
            held[way] = found
            against = AGAINST.get(way, "the first draw")
            change, (low, high) = perplexity_difference(found.loss, held[against].loss)
            rows.append({
                "method": method, "pattern": pattern, "seed": seed, "way": way, "perplexity": found.perplexity,
                "against": against, "difference": change, "interval": [low, high],
            })  # fmt: skip
            print(f"{method:10}{pattern:6}seed {seed}  {way:20}{found.perplexity:9.4f}   "
                  f"{change:+.4f} [{low:+.4f}, {high:+.4f}] against {against}", flush=True)  # fmt: skip
    write(chosen.json, command=["bench/precision.py", *sys.argv[1:]], rows=rows)
