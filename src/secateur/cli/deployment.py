"""The commands after pruning: `bench`, `export`, `validate` and `doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import secateur
from secateur.cli.options import AsJson, Model, Quiet, options
from secateur.cli.terminal import command, display, progress, show
from secateur.system.settings import Destination, Serving, TimedRuns, Trust, taken


@options(TimedRuns, Trust, without=("allow_low_coverage",))
def bench(
    given: dict[str, Any],
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders or hub names to time.")],
    dense: Annotated[
        str | None, typer.Option(help="The dense model. Default: the embedded demo.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .json file to write.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time single matrices of the models instead.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time models beside the dense one on this machine's processor, each in every runtime that has
    it.
    """
    from secateur.cli.tables import layer_table, speed_table
    from secateur.deployment.bench_matrices import time_layers, write_timings

    if layers:
        with display(quiet) as shows:
            runs, trust = taken(TimedRuns, given), taken(Trust, given)
            timings = time_layers(models, runs, shows, trust)
        if out is not None:
            write_timings(timings, out, command())
        return show([asdict(timing) for timing in timings], as_json, lambda: [layer_table(timings)])
    with display(quiet) as shows:
        results = secateur.bench(
            models, dense=dense, **given, out=out, command=command(), progress=shows
        )
    skipped = (escape(f"Not timed: {what}: {reason}") for what, reason in results.skipped.items())
    return show(results, as_json, lambda: [speed_table(results), *skipped])


@options(Destination, Trust, without=("restart", "allow_low_coverage"))
def export(
    given: dict[str, Any],
    model: Model = None,
    to: Annotated[
        str,
        typer.Option(
            help="The format; `secateur doctor` lists them. dense: back to a dense checkpoint."
        ),
    ] = ...,  # type: ignore[assignment]
    values: Annotated[
        str | None,
        typer.Option(
            help="Of packed: int8, int4, 'int4 of group 64'. Of gguf: f32, f16, bf16, q8_0, q6_k, "
            "q5_0, 'int4 of group 32' (Q4_0), 'int8 of group 32', mxfp4. Of compressed-tensors: "
            "int8, 'int4 of group 64' …, fp8, nvfp4, mxfp4. Default: what was pruned with, else "
            "as stored."
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Of tensorrt-llm: how many devices share the model.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in the format of another runtime, or a packed one as a dense checkpoint
    again.
    """
    with display(quiet) as shows:
        options: dict[str, Any] = {"values": values, "ranks": ranks, **given}
        options["trust_remote_code"] = given["trust_remote_code"] or None  # not every format has it
        loaded_by = secateur.export(model, to=to, **options, command=command(), progress=shows)
    show(None, False, lambda: [escape(f"Written to {given['out']}. Loaded by: {loaded_by}.")])


@options(Serving, Trust, without=("allow_low_coverage",))
def validate(
    given: dict[str, Any],
    model: Model = None,
    against: Annotated[
        str | None,
        typer.Option(help="The pruned checkpoint that it was quantised from: its promise counts."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say for every matrix whether a runtime will use its zeros, and why; exit code 1 where a
    promise is not kept.
    """
    from secateur.cli.tables import validation_table
    from secateur.deployment.validate import summary

    progress(quiet=True)
    answer = secateur.validate(model, against=against, **given)
    show(answer, as_json, lambda: [validation_table(answer), *map(escape, summary(answer))])
    if not answer.kept:
        raise typer.Exit(1)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run and measure, and why not the rest."""
    from secateur.cli.tables import doctor_lines
    from secateur.deployment.doctor import examine

    examination = examine()
    show(examination, as_json, lambda: map(escape, doctor_lines(examination)))
