"""The command that says which row of a comparison to take. As in `cli`, parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from secateur.cli.arguments import AsJson
from secateur.cli.terminal import console, print_json
from secateur.errors import printable

if TYPE_CHECKING:
    from secateur.evaluation.advice.recommend import Recommendation


def recommend(
    results: Annotated[
        Path | None,
        typer.Argument(
            metavar="RESULTS", help="results.json of a comparison, or its folder. Without it: priors alone."
        ),
    ] = None,
    goal: Annotated[str, typer.Option(help="quality, latency, memory, portability.")] = ...,  # type: ignore[assignment]
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help="At most so much more than dense, such as 5%. Default 5%, for quality none.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Timings count on this alone: cpu, apple, ampere, hopper, h100, rtx-3090 …")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="The runtime: eager, packed, llamacpp, vllm, tensorrt …")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which row of a comparison to take for a goal, and why, from what was measured alone."""
    import secateur

    found = secateur.recommend(
        results, goal=goal, max_perplexity_increase=max_perplexity_increase, hardware=hardware, runtime=runtime
    )
    if as_json:
        return print_json(found)
    shown = console()
    for line in lines(found):
        shown.print(escape(line), highlight=False, soft_wrap=True)
    return None


def lines(found: Recommendation) -> list[str]:
    """A recommendation as people read it: what to take first, a sentence a line."""
    return [
        *(printable(line) for line in [*found.reasons, found.constraint]),
        *(f"Not considered: {printable(line)}" for line in found.not_considered),
        *(f"To measure it: {printable(line)}" for line in found.measure),
        *(printable(line) for line in found.priors),
    ]
