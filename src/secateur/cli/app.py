"""The command line: the public functions with the same names and defaults.

Options come from `system.settings`; nothing that needs torch is imported before a command runs.
"""

import functools
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import secateur
from secateur.cli import compare, deployment, recommend, recover
from secateur.cli.failures import guarded
from secateur.cli.options import AsJson, Model, Quiet, options
from secateur.cli.terminal import command, display, progress, show, usable_streams
from secateur.system.settings import (
    CalibrationText,
    Compute,
    Destination,
    EvaluationText,
    PlannedRecipe,
    Recipe,
    Trust,
    Unpacking,
    ZeroShot,
)

app = typer.Typer(
    name="secateur",
    help="Prunes pretrained language models and tells the truth about the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("secateur"))
        raise typer.Exit


@options(Recipe, CalibrationText, Compute, Destination, Unpacking, Trust)
def prune(
    given: dict[str, Any], model: Model = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Prune a model; write a checkpoint that every loader reads, and what was done to it."""
    with display(quiet) as shows:
        report = secateur.prune(model, **given, command=command(), progress=shows)

    from secateur.cli.tables import summary

    show(report, as_json, lambda: map(escape, summary(report)))


@options(
    PlannedRecipe,
    CalibrationText,
    Compute,
    Destination,
    Trust,
    without=("align", "keep_zeros", "draft_heads", "out", "restart", "allow_low_coverage"),
)
def plan(
    given: dict[str, Any],
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .json file to write a measured plan to. Without it: a forecast."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take, from config.json alone; with --out, measure how much each matrix
    can lose.

    What is measured is a plan to edit or to prune by (--allocate FILE). --values, --passes and
    --memory are for the forecast, --allocate and --seed for the plan.
    """
    if out is None:
        from secateur.pruning.planning.forecast import lines

        progress(quiet=True)
        foreseen = secateur.forecast(model, **_but(given, "allocate", "seed", *NOT_FORESEEN))
        return show(foreseen, as_json, lambda: map(escape, lines(foreseen)))
    with display(quiet) as shows:
        measuring = _but(given, "values", "passes", "memory")
        measured = secateur.plan(model, out=out, **measuring, command=command(), progress=shows)
    removed = {name: str(pattern) for name, pattern in measured.items()}
    lines = [f"{share:>8}  {escape(name)}" for name, share in removed.items()]
    return show(removed, as_json, lambda: [*lines, f"Written to {escape(str(out))}."])


NOT_FORESEEN = ("bos", "calibration_on", "self_temperature", "overwrite")
"""Options of `plan` that a forecast does not depend on, besides the draw and how it is shared."""


def _but(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


@options(
    EvaluationText, ZeroShot, Compute, Trust, without=("passes", "memory", "allow_low_coverage")
)
def evaluate(
    given: dict[str, Any],
    model: Model = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model to measure the distance from.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model, and with --dense its distance from the dense model; also
    on tasks.
    """
    with display(quiet) as shows:
        evaluation = secateur.evaluate(model, dense=dense, **given, progress=shows)

    from secateur.cli.tables import evaluation_lines

    show(evaluation, as_json, lambda: map(escape, evaluation_lines(evaluation)))


@options(Trust, without=("allow_low_coverage",))
def inspect(
    given: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="DIR", help="A checkpoint folder.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The pruned checkpoint that it was made of: which zeros came back."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint really holds: sparsity, N:M patterns, -0.0 and NaN, matrix by matrix;
    and what quantising, merging or training did to the zeros of a pruned one.
    """
    progress(quiet=True)
    inspection = secateur.inspect(model, against=against, **given)

    from secateur.cli.tables import inspection_summary, inspection_table

    def lines() -> list[Any]:
        return [inspection_table(inspection), *map(escape, inspection_summary(inspection))]

    show(inspection, as_json, lines)


for heading, commands in {
    "Prune": (plan, prune, recover.recover),
    "Measure and choose": (inspect, evaluate, compare.compare, compare.report, recommend.recommend),
    "Deploy": (deployment.validate, deployment.export, deployment.bench, deployment.doctor),
}.items():
    for run in commands:
        app.command(rich_help_panel=heading)(run)


def main() -> None:
    """The entry point of the `secateur` command."""
    usable_streams()
    if not sys.warnoptions:  # what libraries warn programmers of is not shown, unless asked for
        warnings.simplefilter("ignore")
    sys.exit(guarded(functools.partial(app, standalone_mode=True)))
