"""The commands that come after pruning: measure, write for a runtime, ask what it will do, ask what is here.

As in `cli`, parsing and printing only.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateur.cli.arguments import AsJson, Model, Out, Quiet, RemoteCode
from secateur.cli.terminal import command, console, display, numbers, print_json, progress, split
from secateur.system.files import disk_errors
from secateur.system.machine import machine, versions


def bench(
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders to time.")],
    dense: Annotated[str | None, typer.Option(help="The dense model. Default: the embedded demo.")] = None,
    runtimes: Annotated[
        str,
        typer.Option("--runtime", "--runtimes", help="Runtimes, separated by commas; `secateur doctor` lists them."),
    ] = "eager,packed",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "128",
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which every model takes its turn.")] = 8,
    dtype: Annotated[str, typer.Option(help="dtype of the models: bfloat16, float32.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="A .json file to write.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Time single matrices of the models instead.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time models beside the dense one on this machine's processor, each in every runtime that has it."""
    import secateur
    from secateur.cli.tables import layer_table, speed_table
    from secateur.deployment.bench_matrices import time_layers

    if layers:
        with display(quiet) as shows:
            timings = time_layers(models, dtype=dtype, batch=numbers(batch), rounds=rounds, progress=shows)
        lines = [asdict(timing) for timing in timings]
        if out is not None:
            with disk_errors(out):
                held = {"command": command(), "machine": machine(), "versions": versions(), "layers": lines}
                out.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return print_json(lines) if as_json else console().print(layer_table(timings))
    with display(quiet) as shows:
        results = secateur.bench(
            models, dense=dense, runtimes=split(runtimes), batch=numbers(batch), prompt=numbers(prompt), new=new,
            rounds=rounds, dtype=dtype, out=out, command=command(), progress=shows,
        )  # fmt: skip
    if as_json:
        return print_json(results)
    shown = console()
    shown.print(speed_table(results))
    for what, reason in results.skipped.items():
        shown.print(escape(f"Not timed: {what}: {reason}"))
    return None


def export(
    model: Model = None,
    out: Out = ...,  # type: ignore[assignment]
    to: Annotated[
        str, typer.Option(help="The format; `secateur doctor` lists them. dense: back to a dense checkpoint.")
    ] = ...,  # type: ignore[assignment]
    values: Annotated[
        str | None, typer.Option(help="Of packed: int8. Of gguf: f32, f16, bf16, q8_0. Default: as stored.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of tensorrt-llm: how many devices share the model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in the format of another runtime, or a packed one as a dense checkpoint again."""
    import secateur

    options = {name: value for name, value in (("values", values), ("ranks", ranks)) if value is not None}
    with display(quiet) as shows:
        loaded_by = secateur.export(
            model, out=out, to=to, overwrite=overwrite, command=command(), progress=shows, **options
        )
    console().print(f"Written to {escape(str(out))}. Loaded by: {escape(loaded_by)}.")


def validate(
    model: Model = None,
    runtime: Annotated[
        str, typer.Option("--for", help="The runtime: eager, packed, semi-structured, tensorrt-llm …")
    ] = ...,  # type: ignore[assignment]
    batch: Annotated[int, typer.Option(min=1, help="Rows of activations: the batch, in prefill times the tokens.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that share the model (tensorrt-llm).")] = 1,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say for every site whether a runtime will use its zeros, and why; exit code 1 where a promise is not kept."""
    import secateur
    from secateur.cli.tables import validation_table
    from secateur.deployment.validate import summary

    progress(quiet=True)
    found = secateur.validate(model, runtime=runtime, batch=batch, ranks=ranks, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(asdict(found))
    else:
        shown = console()
        shown.print(validation_table(found))
        for line in summary(found):
            shown.print(escape(line))
    if not found.kept:
        raise typer.Exit(1)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run and measure, and why not the rest."""
    from secateur.cli.tables import doctor_lines
    from secateur.deployment.doctor import examine

    found = examine()
    if as_json:
        return print_json(found)
    shown = console()
    for line in doctor_lines(found):
        shown.print(escape(line))
    return None
