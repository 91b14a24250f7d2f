"""Compare two methods on the same tokens, and print who is better by how much.

python examples/compare.py --first wanda --second default --pattern 2:4
"""

import typer

import secateur


def main(
    out: str = "out/examples/compare",
    first: str = "wanda",
    second: str = "default",
    pattern: str = "50%",
    samples: int = 32,
    windows: int = 32,
) -> None:
    results = secateur.compare(out=out, methods=[first, second], patterns=[pattern], samples=samples, windows=windows)
    dense = results.rows[0]
    print(f"{'dense':<12} {dense.perplexity:8.3f}")
    for row in results.rows[1:]:
        low, high = row.delta_interval
        print(f"{row.method:<12} {row.perplexity:8.3f}  {row.delta:+.3f} [{low:.3f}, {high:.3f}]  rank {row.rank}")


if __name__ == "__main__":
    typer.run(main)
