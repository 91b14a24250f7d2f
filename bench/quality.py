"""How much error each method leaves on layers with the hard features of real ones, and what it costs.

    python bench/quality.py --sizes 512x512,2048x1024 --json bench/results/quality.json

Inputs are x = s · D^½ Q Λ^½ z: a power-law spectrum Λ_i = i^-α in a random basis Q, log-normal channel scales D with
0.8 % outlier channels 10 to 30 times larger (and, in the `massive` variant, two channels 400 times larger), and a
Student-t scale s for every token. Weights are normal. The error is ‖(W − V) X‖² / ‖W X‖² on tokens that the method
did not see. The exact row is least squares for each row on the same mask, in float64, as a bound on any refit.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from common import options, write
from torch import Tensor

from secateur.methods import find_method
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.statistics import Stats

METHODS = (
    "magnitude", "wanda", "ria", "wanda+swap", "wanda+refit", "ria+refit", "sparsegpt", "sparsegpt+refit", "sweep",
    "sweep+refit", "fast", "alps-fast", "alps", "best",
)  # fmt: skip
PATTERNS = ("50%", "70%", "4:8", "2:4")


def basis(channels: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(channels, channels, generator=draw))[0]


def inputs(channels: int, tokens: int, alpha: float, massive: bool, seed: int) -> tuple[Tensor, Tensor]:
    """(calibration tokens, as many fresh ones) of one layer, `[tokens, channels]` float32."""
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, channels + 1).float().pow(-alpha / 2)
    scale = torch.randn(channels, generator=draw).mul(0.5).exp()
    outliers = torch.randperm(channels, generator=draw)[: max(1, round(0.008 * channels))]
    scale[outliers] *= 10 + 20 * torch.rand(len(outliers), generator=draw)
    if massive:
        scale[torch.randperm(channels, generator=draw)[:2]] *= 400
    mix = spectrum[:, None] * basis(channels, draw)
    channel = (mix.square().sum(0)).sqrt()
    mix = mix / channel * scale

    def sample(count: int) -> Tensor:
        z = torch.randn(count, channels, generator=draw) @ mix
        chi = torch.randn(count, 5, generator=draw).square().mean(1)  # Student's t with 5 degrees of freedom
        return z / chi.sqrt()[:, None]

    return sample(tokens), sample(max(tokens, 4096))


def exact(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Row-wise least squares on a mask, float64, with next to no ridge: the best any solver can do on these tokens."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    gram, weight = gram.double(), weight.double()
    gram = gram + 1e-8 * gram.diagonal().diag()
    target = weight @ gram
    for row, keep in enumerate(kept):
        index = keep.nonzero()[:, 0]
        result[row, index] = torch.linalg.solve(gram[index][:, index], target[row, index])
    return result.float()


def relative_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    """‖(W − V) X‖² / ‖W X‖²."""
    return ((x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()).item()


def run(rows: int, channels: int, tokens_per_channel: int, alpha: float, massive: bool, with_exact: bool) -> list[dict]:
    """All methods and patterns on one layer."""
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(7))
    calibration, fresh = inputs(channels, tokens_per_channel * channels, alpha, massive, seed=1)
    gram = calibration.T @ calibration
    found = []
    for pattern in PATTERNS:
        baseline = None
        for name in METHODS:
            method = find_method(name)
            stats = Stats(len(calibration), {"gram": gram, "square": gram.diagonal().double()})
            started = time.process_time()
            pruned = method.prune(weight, stats, parse_pattern(pattern).within(method.group))
            seconds = time.process_time() - started
            error = relative_error(weight, pruned.weight, fresh)
            baseline = error if name == "sparsegpt" else baseline
            line = {"layer": f"{rows}x{channels}", "alpha": alpha, "massive": massive, "pattern": pattern,
                    "tokens_per_channel": tokens_per_channel, "method": name, "error": error, "cpu_seconds": seconds,
                    "seen_error": relative_error(weight, pruned.weight, calibration)}  # fmt: skip
            if with_exact and name in ("wanda", "sparsegpt", "sweep", "alps"):
                best = exact(weight, gram, pruned.kept)
                line["exact_error"] = relative_error(weight, best, fresh)
                line["exact_seen_error"] = relative_error(weight, best, calibration)
            found.append(line)
        for line in found[-len(METHODS) :]:
            line["ratio_to_sparsegpt"] = line["error"] / baseline if baseline else None
    return found


def show(lines: list[dict]) -> None:
    """One table a layer: error × 100 and the ratio to SparseGPT, a column for each pattern."""
    for key in dict.fromkeys((x["layer"], x["alpha"], x["massive"], x["tokens_per_channel"]) for x in lines):
        mine = [x for x in lines if (x["layer"], x["alpha"], x["massive"], x["tokens_per_channel"]) == key]
        print(f"\n{key[0]}  α {key[1]}  {'massive  ' if key[2] else ''}{key[3]} tokens a channel; error × 100 (ratio)")
        print(f"{'':18}" + "".join(f"{pattern:>18}" for pattern in PATTERNS) + "   cpu-s at 50%")
        for name in METHODS:
            row = {x["pattern"]: x for x in mine if x["method"] == name}
            text = "".join(
                f"{100 * row[p]['error']:>10.4f} ({row[p]['ratio_to_sparsegpt']:.2f})".rjust(18) for p in PATTERNS
            )
            print(f"{name:18}{text}   {row['50%']['cpu_seconds']:.2f}")
            if "exact_error" in row["50%"]:
                text = "".join(f"{100 * row[p]['exact_error']:.4f}       ".rjust(18) for p in PATTERNS)
                print(f"{'  its mask, exact':18}{text}")


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(sizes="512x512", alphas="1.6,1.1"),
        dict(tokens=("32,4", "tokens for each input channel")),
        dict(exact=(False, "with exact least squares on the masks"), json=Path),
    )
    torch.set_num_threads(1)
    lines: list[dict] = []
    for size in chosen.sizes.split(","):
        rows, channels = map(int, size.split("x"))
        for alpha in map(float, chosen.alphas.split(",")):
            for tokens in map(int, chosen.tokens.split(",")):
                for massive in (False, True):
                    lines += run(rows, channels, tokens, alpha, massive, chosen.exact)
    show(lines)
    write(chosen.json, command=sys.argv, lines=lines)
