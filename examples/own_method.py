"""Add a method of your own without touching the package: a score, and what it reads. docs/adding-a-method.md says more.

python examples/own_method.py
"""

import torch
import typer

import secateur
from secateur.methods.statistics import Stats


def clipped(weight: torch.Tensor, stats: Stats) -> torch.Tensor:
    """Wanda's score with the power of an input held under four times the median, `[out, in]`."""
    power = stats.power().to(weight.device)
    return weight.abs() * power.clamp(max=4 * power.median()).sqrt()


def main(out: str = "out/examples/own", pattern: str = "50%", samples: int = 32) -> None:
    secateur.METHODS["clipped"] = secateur.scored({"square"}, "row", clipped)
    for method in ("wanda", "clipped", "clipped+refit"):
        report = secateur.prune(out=out, method=method, pattern=pattern, samples=samples, overwrite=True)
        error = sum(matrix.output_error or 0 for matrix in report.sites) / len(report.sites)
        print(f"{method:<14} mean relative output error {error:.4f}")


if __name__ == "__main__":
    typer.run(main)
