"""The command line: the public functions with the same names and defaults. Parsing and printing only."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from secateur.cli import compare as study
from secateur.cli import deployment as deploy
from secateur.cli import recommend as advice
from secateur.cli import recover
from secateur.cli.arguments import (
    Align,
    AsJson,
    BatchSize,
    Calibration,
    DataDir,
    Device,
    Dtype,
    EvaluationText,
    Limit,
    LowCoverage,
    Memory,
    Model,
    Out,
    Passes,
    Quiet,
    RemoteCode,
    Restart,
    Samples,
    Seed,
    SeqLen,
    Skip,
    Tasks,
    WindowCount,
)
from secateur.cli.terminal import command, console, display, first_process, print_json, progress, split
from secateur.errors import Interrupted, RankLost, SecateurError, in_one_line, printable

app = typer.Typer(
    name="secateur",
    help="Prunes pretrained language models and tells the truth about the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("secateur"))
        raise typer.Exit


@app.command()
def prune(
    model: Model = None,
    out: Out = ...,  # type: ignore[assignment]
    method: Annotated[
        str, typer.Option(help="A method of the table in the README, or a preset: fast, default, best.")
    ] = "default",
    pattern: Annotated[
        str, typer.Option(help="50%, '50% of row', 2:4, '25% of channels', '4 blocks', 'to 75% of parameters' …")
    ] = "50%",
    allocate: Annotated[
        str, typer.Option(help="How sparsity is shared out: uniform, owl, error, search, or a plan's .json file.")
    ] = "uniform",
    align: Align = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    passes: Passes = "auto",
    memory: Memory = None,
    data_dir: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")] = False,
    restart: Restart = False,
    allow_low_coverage: LowCoverage = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model; write a checkpoint that every loader reads, and what was done to it."""
    import secateur
    from secateur.cli.tables import summary

    with display(quiet) as shows:
        report = secateur.prune(
            model, out=out, method=method, pattern=pattern, allocate=allocate, align=align,
            calibration=calibration, samples=samples, seq_len=seq_len, seed=seed, skip=skip or (), device=device,
            dtype=dtype, batch_size=batch_size, passes=passes, memory=memory, data_dir=data_dir,
            overwrite=overwrite, restart=restart,
            allow_low_coverage=allow_low_coverage, trust_remote_code=trust_remote_code, command=command(),
            progress=shows,
        )  # fmt: skip
    if as_json:
        return print_json(report)
    shown = console()
    for line in summary(report):
        shown.print(escape(line))
    return None


@app.command()
def plan(
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="The .json file to write a measured plan to. Without it: a forecast.")
    ] = None,
    allocate: Annotated[
        str, typer.Option(help="The rule that shares sparsity out: owl, error, search, uniform.")
    ] = "error",
    method: Annotated[str, typer.Option(help="The method whose errors are measured.")] = "default",
    pattern: Annotated[str, typer.Option(help="The mean sparsity, such as 70%.")] = "70%",
    calibration: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    data_dir: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    passes: Annotated[
        str, typer.Option(help="Forecast only. How often a block runs: one, two, or auto: one where it fits.")
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Forecast only. The memory that a run may take, such as 16GB.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take, from config.json alone; with --out, measure how much each site can lose.

    What is measured is a plan to edit or to prune by (--allocate FILE).
    """
    import secateur

    if out is None:
        from secateur.pruning.planning.forecast import lines

        progress(quiet=True)
        foreseen = secateur.forecast(
            model, method=method, pattern=pattern, samples=samples, seq_len=seq_len, skip=skip or (), device=device,
            dtype=dtype, batch_size=batch_size, passes=passes, memory=memory, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if as_json:
            return print_json(foreseen)
        shown = console()
        for line in lines(foreseen):
            shown.print(escape(line), highlight=False, soft_wrap=True)
        return None
    with display(quiet) as shows:
        found = secateur.plan(
            model, out=out, allocate=allocate, method=method, pattern=pattern, calibration=calibration,
            samples=samples, seq_len=seq_len, seed=seed, skip=skip or (), device=device, dtype=dtype,
            batch_size=batch_size, data_dir=data_dir, overwrite=overwrite, trust_remote_code=trust_remote_code,
            command=command(), progress=shows,
        )  # fmt: skip
    sites = {name: str(pattern) for name, pattern in found.items()}
    if as_json:
        return print_json(sites)
    shown = console()
    for name, removed in sites.items():
        shown.print(f"{removed:>8}  {escape(name)}")
    shown.print(f"Written to {escape(str(out))}.")
    return None


@app.command()
def evaluate(
    model: Model = None,
    dense: Annotated[str | None, typer.Option(help="The dense model to measure the distance from.")] = None,
    evaluation: EvaluationText = None,
    windows: WindowCount = None,
    seq_len: SeqLen = None,
    tasks: Tasks = "",
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    data_dir: DataDir = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model, and with --dense its distance from the dense model; also on tasks."""
    import secateur
    from secateur.evaluation.tasks.answer import lines

    with display(quiet) as shows:
        found = secateur.evaluate(
            model, dense=dense, evaluation=evaluation, windows=windows, seq_len=seq_len, tasks=split(tasks),
            limit=limit, device=device, dtype=dtype, batch_size=batch_size, data_dir=data_dir,
            trust_remote_code=trust_remote_code, progress=shows,
        )  # fmt: skip
    if as_json:
        return print_json(found)
    shown = console()
    text = found.evaluation
    shown.print(
        f"Perplexity {found.perplexity:.4f} on {escape(text['source'])} ({text['split']}), {text['samples']} windows "
        f"of {text['length']} tokens."
    )
    if found.delta is not None and found.delta_interval is not None:
        low, high = found.delta_interval
        shown.print(
            f"Dense {found.dense_perplexity:.4f}, difference {found.delta:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}), KL {found.kl:.4f} nats, "
            f"the same top token {found.top1_agreement:.1%} of the time."
        )
    for line in lines(found.tasks or {}):
        shown.print(escape(line), highlight=False)
    return None


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(metavar="DIR", help="A checkpoint folder.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint really holds: sparsity, N:M patterns, -0.0 and NaN, site by site."""
    import secateur
    from secateur.cli.tables import inspection_summary, inspection_table

    progress(quiet=True)
    found = secateur.inspect(model, trust_remote_code=trust_remote_code)
    if as_json:
        return print_json(found)
    shown = console()
    shown.print(inspection_table(found))
    for line in inspection_summary(found):
        shown.print(escape(line))
    return None


app.command()(recover.recover)
app.command()(study.compare)
app.command()(study.report)
app.command()(deploy.bench)
app.command()(deploy.export)
app.command()(deploy.validate)
app.command()(deploy.doctor)
app.command()(advice.recommend)


def guarded(run: Callable[[], Any]) -> int:
    """Run the command line; the exit code. The user's mistakes are one sentence and 2, an interruption 130."""
    try:
        run()
    except SecateurError as error:
        if first_process() or isinstance(error, RankLost):
            print(f"secateur: {printable(str(error))}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except OSError as error:
        print(f"secateur: {printable(in_one_line(error))}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as left:
        if left.code != 130:
            raise
        return _interrupted()  # typer has caught the interruption
    return 0


def _interrupted() -> int:
    print("secateur: interrupted; nothing unfinished was left behind.", file=sys.stderr)
    return 130


def main() -> None:
    """The entry point of the `secateur` command. What libraries warn programmers of is not shown, unless asked for."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.exit(guarded(functools.partial(app, standalone_mode=True)))
