"""Say what a run will take before any work, then measure how much each matrix can lose and prune by that.

python examples/plan.py --allocate error
"""

from pathlib import Path

import typer

import secateur


def main(out: Path = Path("out/examples/plan"), allocate: str = "owl", samples: int = 32) -> None:
    foreseen = secateur.forecast(method="default", pattern="70%", samples=samples)
    most = foreseen.memory[foreseen.passes].bytes
    print(f"{foreseen.parameters:,} parameters; blocks run in passes: {foreseen.passes}; at most {most / 1e6:.0f} MB")

    out.mkdir(parents=True, exist_ok=True)
    file = out / "plan.json"
    plan = secateur.plan(out=file, allocate=allocate, pattern="70%", samples=samples, overwrite=True)
    for matrix, pattern in list(plan.items())[:7]:
        print(f"{pattern!s:>8}  {matrix}")
    report = secateur.prune(out=out / "pruned", allocate=str(file), samples=samples, overwrite=True)
    print(f"pruned to {report.sparsity:.2%}")


if __name__ == "__main__":
    typer.run(main)
