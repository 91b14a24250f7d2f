"""Single matrices, packed and dense, at batch 1 to 8: where zeros pay, against torch and against our own dense kernel.

    python bench/packed.py --json bench/results/packed.json

Every kernel takes its turn in every round and walks over copies that together exceed the last-level cache, so that
weights come from memory as they do in a model. Ratios are medians over rounds of paired times; `bytes` is the ratio of
what is read, which is what a product that only waits for memory can gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.machine import machine, versions
from secateur.packed import dense_product, isa, multiply, pack

BEYOND_CACHE = 600e6


def copies(weight: Tensor, size: float, make: Callable[[Tensor], object]) -> list:
    """Several of them, of `size` bytes each, together beyond the cache."""
    return [make(weight.roll(i, 0)) for i in range(int(BEYOND_CACHE // size) + 1)]


def timed(calls: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds by name, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, variants in calls.items():
            call = variants[number % len(variants)]
            started = perf_counter()
            call()
            if number >= 3:
                seconds[name].append(perf_counter() - started)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--sparsity", default="0.5,0.6,0.7,0.8")
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    lines = []
    print(f"{isa()}, {torch.get_num_threads()} threads, bfloat16")
    print(f"{'shape':>12s}{'batch':>6s}{'zeros':>7s}{'ms':>8s}{'bytes':>7s}{'/ torch':>9s}{'/ own dense':>12s}")
    for shape in chosen.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns).bfloat16()
        size = 2.0 * weight.numel()
        dense = copies(weight, size, lambda w: w)
        for batch in map(int, chosen.batches.split(",")):
            x = torch.randn(batch, columns).bfloat16()
            calls: dict[str, list[Callable[[], object]]] = {"torch": [lambda w=w, x=x: linear(x, w) for w in dense]}
            if batch == 1 and dense_product(weight, x[0]) is not None:
                calls["own dense"] = [lambda w=w, x=x: dense_product(w, x[0]) for w in dense]
            read = {}
            for sparsity in map(float, chosen.sparsity.split(",")):
                zeros = weight.masked_fill(torch.rand(weight.shape) < sparsity, 0)
                read[sparsity] = pack(zeros).bytes
                held = copies(zeros, read[sparsity], pack)
                calls[f"{sparsity:.0%}"] = [lambda p=p, x=x: multiply(p, x) for p in held]
            seconds = timed(calls, chosen.rounds)
            for name, times in seconds.items():
                gain = {
                    other: statistics.median(o / t for o, t in zip(seconds[other], times, strict=True))
                    for other in ("torch", "own dense")
                    if other in seconds
                }
                bytes_ratio = size / read[float(name[:-1]) / 100] if name.endswith("%") else 1.0
                line = {"shape": shape, "batch": batch, "kernel": name, "ms": 1e3 * statistics.median(times)}
                lines.append(line | {"bytes": bytes_ratio, "speedup": gain})
                own = f"{gain['own dense']:12.2f}" if "own dense" in gain else f"{'-':>12s}"
                print(
                    f"{shape:>12s}{batch:6d}{name:>11s}{line['ms']:8.3f}{bytes_ratio:7.2f}{gain['torch']:9.2f}{own}",
                    flush=True,
                )
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"machine": machine(), "versions": versions(), "isa": isa(), "lines": lines}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
