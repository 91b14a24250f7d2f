"""Time a pruned model before and after its zeros are packed away, one token at a time on this processor.

The demo model lies in the cache and is too small to gain much; docs/speed.md has models that are not.

    python examples/packed.py --pattern 70%
"""

from time import perf_counter

import torch
import typer
from transformers import AutoModelForCausalLM

import secateur


def milliseconds(model: torch.nn.Module, rounds: int) -> float:
    """The time of a forward pass of one token, the best of some rounds."""
    token, times = torch.tensor([[1]]), []
    with torch.no_grad():
        for _ in range(rounds):
            begun = perf_counter()
            model(token)
            times.append(perf_counter() - begun)
    return 1000 * min(times)


def main(out: str = "out/examples/packed", pattern: str = "70%", samples: int = 16, rounds: int = 50) -> None:
    secateur.prune(out=out, method="fast", pattern=pattern, samples=samples, overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    dense = milliseconds(model, rounds)
    names = secateur.pack_model(model)
    print(f"{len(names)} layers packed: {dense:.2f} ms a token before, {milliseconds(model, rounds):.2f} ms after")


if __name__ == "__main__":
    typer.run(main)
