"""What each method costs on Llama-2-7B: counted operations, not a run.

    python bench/cost.py --json bench/results/cost-7b.json

Three steps, each checked by the one before it. (1) The matrix operations of every `method.prune` are counted while
it runs on two small layers, and a closed formula in the layer's shape must give the same count. (2) The formulas are
evaluated at the shapes of Llama-2-7B; the forward pass and the Gram matrices are formulas alone. (3) The rate of
float32 products on this machine and the seconds of each method on one middling layer are measured, so that the last
columns show how far a method is from its arithmetic.

The formulas are those that each method states (`Method.cost`). Not counted: passes over the elements of a matrix,
such as scores, thresholds and masks. They are what the last columns show above 1, with the column sweep's other cost:
it is a chain of one small step per input.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import options, write
from quality import inputs
from torch import Tensor

from secateur.methods import find_method
from secateur.methods.cost import Cost
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.statistics import Stats
from secateur.models.stream.steps import batch_of_a_step
from secateur.pruning.planning.passes import passes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.counting import counted

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "sweep+refit", "fast", "default", "alps", "best")
"""Those whose closed formula in its `cost` is counted and evaluated here."""

BLOCKS, SAMPLES, CONTEXT, BATCH = 32, 128, 2048, 8
TOKENS = SAMPLES * CONTEXT
SITES = {  # those with the same inputs in one group, [out, in]
    "q, k, v": [(4096, 4096)] * 3,
    "o": [(4096, 4096)],
    "gate, up": [(11008, 4096)] * 2,
    "down": [(4096, 11008)],
}


def cost(name: str) -> Cost:
    """What the method of that name says of its cost."""
    stated = find_method(name).cost
    assert stated is not None, name
    return stated


def count(name: str, rows: int, columns: int) -> float:
    """Operations of one `prune`, counted while it runs."""
    method = find_method(name)
    weight, stats = _layer(rows, columns, "cross" in method.need)
    return counted(lambda: method.prune(weight, stats, parse_pattern("50%").within(method.group)))


def check() -> list[dict]:
    """Counted operations beside the formula's, at two small sizes. Exits where they are not the same."""
    lines = []
    for rows, columns in ((192, 320), (448, 160)):
        for name in METHODS:
            found, costs = count(name, rows, columns), cost(name)
            formula = costs.of_matrix(rows, columns) + costs.shared(columns)
            if abs(found - formula) > 1e-9 * found:
                sys.exit(f"{name} at {rows}x{columns}: counted {found:.0f} operations, the formula says {formula:.0f}")
            lines.append({"kind": "counted", "method": name, "layer": f"{rows}x{columns}", "flops": found})
    return lines


def model_lines() -> list[dict]:
    """Operations for a block and for the model, from the formulas."""
    sites = [shape for group in SITES.values() for shape in group]
    linear = 2 * TOKENS * sum(rows * columns for rows, columns in sites)
    attention = 4 * TOKENS * CONTEXT * 4096  # scores and values, with no use made of the causal mask
    parts = {
        "forward pass, once": (float(linear + attention), 0),
        "Gram matrices": (float(sum(2 * TOKENS * group[0][1] ** 2 for group in SITES.values())), 0),
    }
    forward, grams = (flops for flops, _ in parts.values())
    whole = {}
    for name in METHODS:
        costs, method = cost(name), find_method(name)
        solving = sum(costs.of_matrix(*shape) for shape in sites)
        solving += sum(costs.shared(group[0][1]) for group in SITES.values())
        parts[name] = (solving, steps(costs, sites))
        windows = SAMPLES if method.need else BATCH
        batch = batch_of_a_step(SAMPLES, CONTEXT, BATCH) if method.refine else BATCH
        often = passes(method, len(SITES), "two", SAMPLES, batch)
        through = ((often.whole + often.after) * windows + often.first * min(windows, BATCH)) / SAMPLES
        through += 5 * method.distil / TOKENS  # the dense model once, then forward twice and backward
        whole[name] = solving + len(method.need & {"gram", "cross"}) * grams + through * forward
    return [
        {"kind": "derived", "part": part, "block_flops": flops, "model_flops": BLOCKS * flops,
         "model_sequential_steps": BLOCKS * chain, "model_flops_with_passes": BLOCKS * whole.get(part, flops)}
        for part, (flops, chain) in parts.items()
    ]  # fmt: skip


def steps(costs: Cost, sites: list[tuple[int, int]]) -> int:
    """Matrix operations that wait for one another: a sweep has one for each input."""
    return sum(costs.products + costs.inverses + costs.factors + costs.sweeps * columns for _, columns in sites)


def rate(threads: int) -> float:
    """Operations a second of float32 products 1024 × 1024, the best of a hundred.

    One thread by its processor time, as the methods are, so that other work on the machine does not show. Two by the
    clock, where it does: read that one beside the load.
    """
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = min(_seconds(clock, torch.mm, a, b) for _ in range(100))
    torch.set_num_threads(1)
    return 2 * 1024**3 / seconds


def measure(size: int, one_thread: float) -> list[dict]:
    """Processor seconds of each method on one layer `[size, size]`, one thread, the best of three."""
    lines = []
    for name in METHODS:
        costs, method = cost(name), find_method(name)
        weight, stats = _layer(size, size, "cross" in method.need)
        for pattern in ("50%", "2:4"):
            resolved = parse_pattern(pattern).within(method.group)
            fresh = [Stats(stats.tokens, stats.sums) for _ in range(3)]  # nothing derived yet
            seconds = min(_seconds(time.process_time, method.prune, weight, each, resolved) for each in fresh)
            flops = costs.of_matrix(size, size) + costs.shared(size)
            lines.append({"kind": "measured", "method": name, "layer": f"{size}x{size}", "pattern": pattern,
                          "cpu_seconds": seconds, "flops": flops,
                          "seconds_over_arithmetic": seconds * one_thread / flops if flops else None})  # fmt: skip
    return lines


def _layer(rows: int, columns: int, dense: bool) -> tuple[Tensor, Stats]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    x, _ = inputs(columns, 4 * columns, 1.6, False, seed=1)
    gram = (x.T @ x).double()
    sums = {"gram": gram, "square": gram.diagonal()}
    return weight, Stats(len(x), sums | ({"cross": gram} if dense else {}))


def _seconds(clock: Callable[[], float], work: Callable[..., object], *arguments: object) -> float:
    started = clock()
    work(*arguments)
    return clock() - started


def show(rates: dict[int, float], lines: list[dict], size: int, load: float) -> None:
    """One table: derived columns for the model, measured columns for one layer."""
    print(f"Measured: float32 products {rates[1] / 1e9:.0f} Gflop/s on one thread (processor time),", end=" ")
    print(f"{rates[2] / 1e9:.0f} on two (clock, load average {load:.1f} at the start).")
    print("Counted: formula and count agree for every method at two sizes.\n")
    print(f"{'':20}{'derived: Llama-2-7B, 128 x 2048 tokens':^60}{f'measured: {size}x{size}, one thread':^38}")
    print(f"{'':20}{'Tflop/block':>12}{'Pflop/model':>12}{'/ forward':>10}{'steps/model':>14}{'whole run':>12}", end="")
    print(f"{'cpu-s 50%':>10}{'/ flop':>8}{'cpu-s 2:4':>12}{'/ flop':>8}")
    derived = [line for line in lines if line["kind"] == "derived"]
    for line in derived:
        part = line["part"]
        text = f"{part:20}{line['block_flops'] / 1e12:12.1f}{line['model_flops'] / 1e15:12.2f}"
        text += f"{line['block_flops'] / derived[0]['block_flops']:10.2f}{line['model_sequential_steps'] or '':>14}"
        text += f"{line['model_flops_with_passes'] / 1e15:12.1f}"
        for mine in (x for x in lines if x["kind"] == "measured" and x["method"] == part):
            ratio = mine["seconds_over_arithmetic"]
            text += f"{mine['cpu_seconds']:{10 if mine['pattern'] == '50%' else 12}.3f}"
            text += f"{ratio:8.1f}" if ratio else f"{'-':>8}"
        print(text)
    print("\n/ forward: operations over those of one forward pass of the calibration tokens.")
    print("whole run: Pflop with the passes of the tokens through the blocks and the Gram matrices.")
    print("steps: matrix operations that wait for one another; a sweep has one for each input of each site.")
    print("/ flop: seconds over what the operations would take at the rate of products on one thread.")


if __name__ == "__main__":
    chosen = options(__doc__, dict(size=(1024, "the side of the layer that is measured"), json=Path))
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found = check() + model_lines()
    rates = {threads: rate(threads) for threads in (1, 2)}
    found += measure(chosen.size, rates[1])
    show(rates, found, chosen.size, load)
    clocks = {1: "processor", 2: "wall"}
    found += [{"kind": "measured", "threads": n, "clock": clocks[n], "flops_per_second": x} for n, x in rates.items()]
    write(chosen.json, command=sys.argv, load_average=load, lines=found)
