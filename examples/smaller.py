"""Take whole channels out: a smaller dense model that every runtime runs faster.

python examples/smaller.py --pattern "to 75% of parameters"
"""

import typer
from transformers import AutoModelForCausalLM

import secateur


def main(
    out: str = "out/examples/smaller", pattern: str = "25% of channels", samples: int = 32, windows: int = 32
) -> None:
    report = secateur.prune(out=out, pattern=pattern, samples=samples, overwrite=True)
    before, after = report.parameters or (0, 0)
    print(f"{before:,} parameters before, {after:,} after")

    model = AutoModelForCausalLM.from_pretrained(out)
    print(f"feed-forward width of the stock {type(model).__name__}: {model.config.intermediate_size}")
    found = secateur.evaluate(out, evaluation="demo", windows=windows)
    print(f"perplexity {found.perplexity:.3f} on {windows} windows")


if __name__ == "__main__":
    typer.run(main)
