"""Prune with one method, then load the result with plain transformers: nothing of ours is needed to run it.

python examples/reload.py --method sparsegpt --pattern 2:4
"""

from typing import Any

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur


def main(out: str = "out/examples/reload", method: str = "default", pattern: str = "50%", samples: int = 32) -> None:
    report = secateur.prune(out=out, method=method, pattern=pattern, samples=samples, overwrite=True)
    print(f"{report.method} {report.pattern}: {report.sparsity:.2%} of the weights of {len(report.sites)} matrices")

    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    down = model.model.layers[0].mlp.down_proj.weight
    print(f"zeros in the first down_proj, as transformers has it: {(down == 0).float().mean():.2%}")
    prompt = tokenizer("def read(self, size):\n", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    typer.run(main)
