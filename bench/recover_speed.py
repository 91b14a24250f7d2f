"""How fast `recover --with distill` trains a real model, beside the bare products of its steps, and in what memory.

    python bench/recover_speed.py --json bench/results/recover-speed.json

The model is that of bench/real.py, pruned by magnitude, and the text is C4. A run of its own trains for some steps of
8 windows of 512 tokens; the median of the steps behind the first counts, and the peak of anonymous memory. The products
are those of every linear layer and of the head for as many tokens: forward of the pruned model and of the dense one,
and backward to inputs and to weights, one after the other in the dtype that the training multiplies in.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import options, write
from real import model_file, texts

import secateur
from secateur.models.load import load, resolve
from secateur.models.matrices import weight_matrices
from secateur.recovery.training import TOKENS_AT_ONCE
from secateur.system.clock import best_seconds

TRAIN = """
import json, sys
from time import perf_counter
from secateur.recovery.recover import recover
from secateur.system.memory import PeakMemory
from secateur.system.progress import Progress

class Clock(Progress):
    ends = []

    def advance(self, said, done, steps):
        self.ends.append(perf_counter())

given = json.loads(sys.argv[1])
with PeakMemory() as peak:
    done = recover(given.pop("model"), progress=Clock(), **given)
ends = Clock.ends
print(json.dumps({"seconds": [b - a for a, b in zip(ends, ends[1:])], "dtype": done.dtype, "peak_bytes": peak.bytes}))
"""


def product_seconds(shapes: list[torch.Size], tokens: int, dtype: torch.dtype) -> float:
    """How long the products of one step take: two forward, one to the inputs and one to the weights."""
    total = 0.0
    for shape in sorted(set(shapes)):
        weight = torch.randn(*shape, dtype=dtype)
        inputs, gradient = (torch.randn(TOKENS_AT_ONCE, size, dtype=dtype) for size in (shape[1], shape[0]))
        once = 2 * best_seconds(partial(torch.mm, inputs, weight.T)) + best_seconds(partial(torch.mm, gradient, weight))
        once += best_seconds(partial(torch.mm, gradient.T, inputs))
        total += shapes.count(shape) * once * tokens / TOKENS_AT_ONCE
    return total


def main() -> None:
    given = options(
        __doc__,
        {"data_dir": (Path, "a folder with local copies of c4 and wikitext2"), "folder": Path("out/real")},
        {"out": Path("out/recover-speed"), "steps": 5, "batch_size": 8, "seq_len": 512, "json": Path},
    )
    dense, pruned = resolve(model_file(given.folder)), given.out / "pruned"
    named = dict(zip(*[iter(texts(given.data_dir))] * 2, strict=True))
    local = named.get("--data-dir")
    if not pruned.exists():
        secateur.prune(dense, out=pruned, method="magnitude", calibration="demo")
    wanted: dict[str, Any] = {
        "model": str(pruned), "dense": str(dense), "way": "distill", "text": named["--calibration"],
        "evaluation": None, "data_dir": local, "steps": given.steps, "batch_size": given.batch_size,
        "seq_len": given.seq_len, "out": str(given.out / "recovered"), "overwrite": True, "restart": True,
        "save_every": given.steps + 1,
    }  # fmt: skip
    child = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(wanted)], check=True, stdout=subprocess.PIPE)
    found = json.loads(child.stdout.splitlines()[-1])
    model = load(dense)
    shapes = [one.weight.shape for block in model.blocks for one in weight_matrices(block).values()]
    head = model.model.get_output_embeddings()
    shapes += [head.weight.shape] if head else []
    tokens = given.batch_size * given.seq_len
    bare = product_seconds(shapes, tokens, getattr(torch, found["dtype"]))
    seconds = statistics.median(found["seconds"])
    result = {
        "tokens_a_second": tokens / seconds,
        "products_alone": tokens / bare,
        "share": bare / seconds,
        "dtype": found["dtype"],
        "peak_bytes": found["peak_bytes"],
        "threads": torch.get_num_threads(),
        "steps": found["seconds"],
    }
    print(json.dumps(result))
    write(given.json, command=sys.argv, **result)


if __name__ == "__main__":
    main()
