"""The commands of a comparison: `compare` makes one, `report` writes its pages again and joins
several.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

import secateur
from secateur.cli.options import AsJson, Model, Quiet, options
from secateur.cli.terminal import command, console, display, show
from secateur.errors import printable
from secateur.system.settings import (
    CalibrationDraws,
    Compute,
    Destination,
    EvaluationText,
    Grid,
    RecoveredRows,
    TimedRows,
    Trust,
    ZeroShot,
)

if TYPE_CHECKING:
    from secateur.evaluation.results.schema import Results


@options(
    Grid,
    CalibrationDraws,
    EvaluationText,
    ZeroShot,
    RecoveredRows,
    TimedRows,
    Compute,
    Destination,
    Trust,
    without=("overwrite",),
)
def compare(
    given: dict[str, Any], model: Model = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Prune with every method and pattern on the same tokens, and say which is better by how
    much.
    """
    with display(quiet) as shows:
        results = secateur.compare(model, **given, command=command(), progress=shows)

    written = f"Written to {escape(str(given['out'] / 'results.json'))}, report.html and report.md."
    show(results, as_json, lambda: [*_shown(results), written])


@options(Destination, without=("overwrite", "restart"))
def report(
    given: dict[str, Any],
    results: Annotated[
        list[Path], typer.Argument(help="results.json files, or the folders of comparisons.")
    ],
) -> None:
    """Write report.html and report.md of a comparison, or of several under the same conditions as
    one.
    """
    joined = secateur.report(results, **given)

    written = f"Written to {escape(str(given['out'] / 'report.html'))}, report.md and results.json."
    show(joined, False, lambda: [*_shown(joined), written])


def _shown(results: "Results") -> list[Any]:
    """The tables of a comparison, and what must be known besides."""
    from secateur.cli.tables import comparison_tables

    notes = (escape(printable(note)) for note in results.notes)
    return [comparison_tables(results, console().width), *notes]
