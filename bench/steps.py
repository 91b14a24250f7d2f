"""The steps of pruning one matrix, ours and those of the published code, in turn: CPU seconds on one thread.

    OMP_NUM_THREADS=1 python bench/steps.py --json bench/results/steps.json

The other side says in our words what the code of the Wanda and SparseGPT papers does at each step: a product in
float32; a stable sort of every row and a scatter; a loop over groups with topk; a sort of all magnitudes and `<=`;
three factorisations and a loop over columns. Both sides begin with the weights and the statistics and end with the
pruned weights, or with inputs of 4096 tokens and their Gram matrix; for masks the part from scores to mask is timed
alone too. Weights are normal, inputs correlated with channels of unequal scale. Of several rounds the median is
reported. CPU time does not count what other programs took, but caches and memory are shared with them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import options, write
from torch import Tensor

from secateur.kernels.gram import add_products
from secateur.kernels.library import isa
from secateur.methods import METHODS
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import Pattern
from secateur.methods.statistics import Stats

SHARE, GROUP, REMOVED, BLOCK = 0.5, 4, 2, 128
TOKENS = 4096
"""Of which a Gram matrix is made."""


@dataclass(frozen=True)
class Step:
    """Both ways of one step; each returns the pruned weights, or a mask of what is kept."""

    name: str
    ours: Callable[[], Tensor]
    published: Callable[[], Tensor]


def row_mask(scores: Tensor) -> Tensor:
    """Wanda's mask, bool `[out, in]`, True is removed: every row sorted, the first of the order scattered."""
    order = torch.sort(scores, dim=-1, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, : int(scores.shape[1] * SHARE)], True)


def group_mask(scores: Tensor) -> Tensor:
    """The N:M mask of both papers, True is removed: one topk after the other."""
    removed = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], GROUP):
        lowest = scores[:, start : start + GROUP].float().topk(REMOVED, dim=1, largest=False).indices
        removed.scatter_(1, start + lowest, True)
    return removed


def matrix_mask(scores: Tensor) -> Tensor:
    """The mask by magnitude, True is removed: everything up to a place in the order of all."""
    return scores <= torch.sort(scores.flatten()).values[int(scores.numel() * SHARE)]


def zeroed(weight: Tensor, removed: Tensor) -> Tensor:
    """A copy of the weights without those removed, as the published code assigns."""
    pruned = weight.clone()
    pruned[removed] = 0
    return pruned


def published_importance(weight: Tensor, power: Tensor) -> Tensor:
    return weight.abs() * power.reshape(1, -1).sqrt()


def published_sparsegpt(weight: Tensor, gram: Tensor, groups: bool) -> Tensor:
    """SparseGPT from the mean Gram matrix, float32: factor, inverse, factor, then column after column."""
    weight, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for start in range(0, len(gram), BLOCK):
        stop = min(start + BLOCK, len(gram))
        block, factor = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        finished, errors = torch.zeros_like(block), torch.zeros_like(block)
        removed = torch.zeros_like(block, dtype=torch.bool)
        if not groups:
            scores = block**2 / factor.diagonal().reshape(1, -1) ** 2
            removed = scores <= torch.sort(scores.flatten()).values[int(scores.numel() * SHARE)]
        for j in range(stop - start):
            if groups and j % GROUP == 0:
                scores = block[:, j : j + GROUP] ** 2 / factor.diagonal()[j : j + GROUP].reshape(1, -1) ** 2
                removed.scatter_(1, j + scores.topk(REMOVED, dim=1, largest=False).indices, True)
            left = block[:, j].clone()
            left[removed[:, j]] = 0
            finished[:, j] = left
            error = (block[:, j] - left) / factor[j, j]
            block[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:stop] = finished
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return weight


def steps(rows: int, columns: int) -> list[Step]:
    """All steps on one random matrix."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    x = torch.randn(2 * columns, columns, generator=draw) * torch.randn(columns, generator=draw).mul(0.5).exp()
    x[:, 1:] += 0.5 * x[:, :-1]
    gram = (x.T @ x).double()
    tokens = len(x)
    power, mean = (gram.diagonal() / tokens).float(), (gram / tokens).float()
    size, importance = weight.abs(), published_importance(weight, power)
    any_row, groups = parse_pattern("50%"), parse_pattern(f"{GROUP - REMOVED}:{GROUP}")

    def ours(name: str, pattern: Pattern) -> Callable[[], Tensor]:
        def prune() -> Tensor:
            stats = Stats(tokens, {"square": gram.diagonal(), "gram": gram})  # new ones, so that nothing is kept
            return METHODS[name].prune(weight, stats, pattern.within(METHODS[name].group)).weight

        return prune

    total, sums = torch.zeros_like(gram), torch.zeros_like(mean)

    def products(inputs: Tensor) -> Callable[[], Tensor]:
        def add() -> Tensor:
            add_products(total, inputs, inputs)
            return total

        return add

    def published_products(inputs: Tensor) -> Tensor:
        inputs = inputs.T.float()
        return sums.add_(inputs.matmul(inputs.T))

    def mask(scores: Tensor, pattern: Pattern) -> Callable[[], Tensor]:
        return lambda: pattern.mask(scores)

    some = x[:TOKENS].contiguous()
    return [
        Step("Gram matrix, float32", products(some), lambda: published_products(some)),
        Step("Gram matrix, bfloat16", products(some.bfloat16()), lambda: published_products(some.bfloat16())),
        Step("row mask", mask(importance, any_row.within("row")), lambda: ~row_mask(importance)),
        Step("2:4 mask", mask(importance, groups), lambda: ~group_mask(importance)),
        Step("matrix mask", mask(size, any_row.within("matrix")), lambda: ~matrix_mask(size)),
        Step("wanda, 50%", ours("wanda", any_row),
             lambda: zeroed(weight, row_mask(published_importance(weight, power)))),
        Step("wanda, 2:4", ours("wanda", groups),
             lambda: zeroed(weight, group_mask(published_importance(weight, power)))),
        Step("magnitude, 50%", ours("magnitude", any_row), lambda: zeroed(weight, matrix_mask(weight.abs()))),
        Step("magnitude, 2:4", ours("magnitude", groups), lambda: zeroed(weight, group_mask(weight.abs()))),
        Step("sparsegpt, 50%", ours("sparsegpt", any_row), lambda: published_sparsegpt(weight, mean, False)),
        Step("sparsegpt, 2:4", ours("sparsegpt", groups), lambda: published_sparsegpt(weight, mean, True)),
    ]  # fmt: skip


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(step: Step, rounds: int) -> dict:
    """CPU seconds of both sides in turn, and the share of weights on whose removal they agree."""
    times: dict[str, list[float]] = {"ours": [], "published": []}
    agreement = 0.0
    for _ in range(rounds):
        seconds, own = timed(step.ours)
        times["ours"].append(seconds)
        seconds, other = timed(step.published)
        times["published"].append(seconds)
        agreement = ((own != 0) == (other != 0)).float().mean().item()
    median = {side: statistics.median(found) for side, found in times.items()}
    least = {side: min(found) for side, found in times.items()}
    ratio = median["published"] / median["ours"]
    return {"step": step.name, "cpu_seconds": median, "least": least, "ratio": ratio, "agreement": agreement}


if __name__ == "__main__":
    chosen = options(__doc__, dict(shapes=("4096x4096", "out x in, separated by commas"), rounds=3, json=Path))
    torch.set_num_threads(1)
    lines = []
    for shape in chosen.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for step in steps(rows, columns):
            line = {"shape": shape, **measure(step, chosen.rounds)}
            lines.append(line)
            found = line["cpu_seconds"]
            print(f"{shape:>12} {step.name:22} ours {found['ours']:7.3f} s, published {found['published']:7.3f} s: "
                  f"{line['ratio']:5.1f} times; {100 * line['agreement']:.3f} % the same", flush=True)  # fmt: skip
    write(chosen.json, command=sys.argv, isa=isa(), lines=lines)
