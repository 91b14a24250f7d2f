"""The command that says which row of a comparison to take. As in `app`, parsing and printing
only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

import secateur
from secateur.cli.options import AsJson, options
from secateur.cli.terminal import show
from secateur.errors import printable
from secateur.system.settings import Goal

if TYPE_CHECKING:
    from secateur.evaluation.advice.recommend import Recommendation


@options(Goal)
def recommend(
    given: dict[str, Any],
    results: Annotated[
        Path | None,
        typer.Argument(
            metavar="RESULTS",
            help="results.json of a comparison, or its folder. Without it: priors alone.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which row of a comparison to take for a goal, and why, from what was measured alone."""
    advice = secateur.recommend(results, **given)
    show(advice, as_json, lambda: map(escape, lines(advice)))


def lines(advice: Recommendation) -> Iterator[str]:
    """A recommendation as people read it: what to take first, a sentence a line."""
    yield from map(printable, [*advice.reasons, advice.constraint])
    yield from (f"Not considered: {printable(line)}" for line in advice.not_considered)
    yield from (f"To measure it: {printable(line)}" for line in advice.measure)
    yield from map(printable, advice.priors)
