"""Single matrices, packed and dense: where zeros pay, against torch and against our own dense kernels.

    python bench/packed.py --json bench/results/packed.json

What `secateur bench --layers` does for the matrices of a model, here for random ones of any shape.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from common import options, write
from rich.console import Console

from secateur.cli.tables import layer_table
from secateur.deployment.bench_matrices import time_matrices
from secateur.kernels.library import isa
from secateur.system.settings import TimedRuns

if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(shapes="4096x4096,11008x4096", sparsity="0.5,0.6,0.7,0.8", batches="1,2,4,8"),
        dict(rounds=40, json=Path),
    )
    torch.manual_seed(0)
    matrices = {}
    for shape in chosen.shapes.split(","):
        weight = torch.randn(*map(int, shape.split("x"))).bfloat16()
        for sparsity in map(float, chosen.sparsity.split(",")):
            matrices[f"{shape} {sparsity:.0%}"] = weight.masked_fill(torch.rand(weight.shape) < sparsity, 0)
    batch = [int(size) for size in chosen.batches.split(",")]
    found = time_matrices(matrices, TimedRuns(batch=batch, rounds=chosen.rounds))
    print(f"{isa()}, {torch.get_num_threads()} threads, bfloat16")
    Console(width=140).print(layer_table(found))
    write(chosen.json, isa=isa(), lines=[asdict(line) for line in found])
