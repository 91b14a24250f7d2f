"""The command line: the public functions with the same names and defaults. Parsing and printing only."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from secateur.arguments import (
    Align,
    AsJson,
    BatchSize,
    Calibration,
    DataDir,
    Device,
    Dtype,
    EvaluationText,
    LowCoverage,
    Model,
    Out,
    Quiet,
    RemoteCode,
    Samples,
    Seed,
    SeqLen,
    Skip,
    WindowCount,
)
from secateur.errors import SecateurError, in_one_line

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


def _progress(quiet: bool) -> Any:
    """The progress display, with the loading bars of the libraries turned off."""
    import datasets
    import transformers

    from secateur.progress import show

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return show(quiet)


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
    data_dir: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")] = False,
    allow_low_coverage: LowCoverage = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model; write a checkpoint that every loader reads, and what was done to it."""
    import secateur
    from secateur.report import summary

    with _display(quiet) as progress:
        report = secateur.prune(
            model, out=out, method=method, pattern=pattern, allocate=allocate, align=align,
            calibration=calibration, samples=samples, seq_len=seq_len, seed=seed, skip=skip or (), device=device,
            dtype=dtype, batch_size=batch_size, data_dir=data_dir, overwrite=overwrite,
            allow_low_coverage=allow_low_coverage, trust_remote_code=trust_remote_code, command=_command(),
            progress=progress,
        )  # fmt: skip
    if as_json:
        return _print_json(report)
    console = _console()
    for line in summary(report):
        console.print(escape(line))
    return None


@app.command()
def plan(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="The .json file to write.")] = ...,  # type: ignore[assignment]
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
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much each site can lose, and write it as a plan to edit or to prune by (--allocate FILE)."""
    import secateur

    with _display(quiet) as progress:
        found = secateur.plan(
            model, out=out, allocate=allocate, method=method, pattern=pattern, calibration=calibration,
            samples=samples, seq_len=seq_len, seed=seed, skip=skip or (), device=device, dtype=dtype,
            batch_size=batch_size, data_dir=data_dir, overwrite=overwrite, trust_remote_code=trust_remote_code,
            command=_command(), progress=progress,
        )  # fmt: skip
    sites = {name: str(pattern) for name, pattern in found.items()}
    if as_json:
        return _print_json(sites)
    console = _console()
    for name, removed in sites.items():
        console.print(f"{removed:>8}  {escape(name)}")
    console.print(f"Written to {escape(str(out))}.")
    return None


@app.command()
def evaluate(
    model: Model = None,
    dense: Annotated[str | None, typer.Option(help="The dense model to measure the distance from.")] = None,
    evaluation: EvaluationText = None,
    windows: WindowCount = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    data_dir: DataDir = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a model, and with --dense its distance from the dense model."""
    import secateur

    with _display(quiet) as progress:
        found = secateur.evaluate(
            model, dense=dense, evaluation=evaluation, windows=windows, seq_len=seq_len, device=device,
            dtype=dtype, batch_size=batch_size, data_dir=data_dir, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    if as_json:
        return _print_json(found)
    console = _console()
    text = found.evaluation
    console.print(
        f"Perplexity {found.perplexity:.4f} on {escape(text['source'])} ({text['split']}), {text['samples']} windows "
        f"of {text['length']} tokens."
    )
    if found.delta is not None and found.delta_interval is not None:
        low, high = found.delta_interval
        console.print(
            f"Dense {found.dense_perplexity:.4f}, difference {found.delta:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}), KL {found.kl:.4f} nats, "
            f"the same top token {found.top1_agreement:.1%} of the time."
        )
    return None


@app.command()
def compare(
    model: Model = None,
    out: Out = ...,  # type: ignore[assignment]
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "magnitude,wanda,sparsegpt",
    patterns: Annotated[str, typer.Option(help="Patterns, separated by commas.")] = "50%,4:8,2:4",
    allocate: Annotated[
        str, typer.Option(help="How sparsity is shared out, a row each: uniform, owl, error, search.")
    ] = "uniform",
    align: Align = None,
    calibration: Calibration = None,
    evaluation: EvaluationText = None,
    samples: Samples = 128,
    windows: WindowCount = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    data_dir: DataDir = None,
    allow_low_coverage: LowCoverage = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune with every method and pattern on the same tokens, and say which is better by how much."""
    import secateur
    from secateur.report import table

    with _display(quiet) as progress:
        results = secateur.compare(
            model, out=out, methods=_list(methods), patterns=_list(patterns),
            allocate=_list(allocate), align=align, calibration=calibration, evaluation=evaluation, samples=samples,
            windows=windows, seq_len=seq_len, seed=seed, skip=skip or (),
            device=device, dtype=dtype, batch_size=batch_size,
            data_dir=data_dir,
            allow_low_coverage=allow_low_coverage, trust_remote_code=trust_remote_code, command=_command(),
            progress=progress,
        )  # fmt: skip
    if as_json:
        return _print_json(results)
    console = _console()
    console.print(table(results, console.width))
    console.print(f"Written to {escape(str(out / 'results.json'))} and report.md.")
    return None


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Checkpoint folders to time.")],
    dense: Annotated[str | None, typer.Option(help="The dense model. Default: the embedded demo.")] = None,
    runtimes: Annotated[str, typer.Option(help="Runtimes, separated by commas: eager, packed.")] = "eager,packed",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "128",
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which every model takes its turn.")] = 8,
    dtype: Annotated[str, typer.Option(help="dtype of the models: bfloat16, float32.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="A .json file to write.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Time models beside the dense one on this machine's processor, each in every runtime that has it."""
    import secateur
    from secateur.report import speed_table

    with _display(quiet) as progress:
        results = secateur.bench(
            models, dense=dense, runtimes=_list(runtimes), batch=_numbers(batch), prompt=_numbers(prompt), new=new,
            rounds=rounds, dtype=dtype, out=out, command=_command(), progress=progress,
        )  # fmt: skip
    if as_json:
        return _print_json(results)
    console = _console()
    console.print(speed_table(results))
    for what, reason in results.skipped.items():
        console.print(escape(f"Not timed: {what}: {reason}"))
    return None


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(metavar="DIR", help="A checkpoint folder.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint really holds: sparsity, N:M patterns, -0.0 and NaN, site by site."""
    import secateur
    from secateur.report import inspection_summary, inspection_table

    _progress(quiet=True)
    found = secateur.inspect(model, trust_remote_code=trust_remote_code)
    if as_json:
        return _print_json(found)
    console = _console()
    console.print(inspection_table(found))
    for line in inspection_summary(found):
        console.print(escape(line))
    return None


class _display:  # noqa: N801 — used as a function
    """The progress display for a `with` block, closed whatever happens."""

    def __init__(self, quiet: bool) -> None:
        self.progress = _progress(quiet)

    def __enter__(self) -> Any:
        return self.progress

    def __exit__(self, *error: object) -> None:
        self.progress.end()


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for whole tables."""
    return Console(width=None if sys.stdout.isatty() else 180)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _list(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers") from None


def _command() -> list[str]:
    return ["secateur", *sys.argv[1:]]


def _print_json(value: Any) -> None:
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str))


def guarded(run: Callable[[], Any]) -> int:
    """Run the command line; the exit code. The user's mistakes are one sentence and 2, an interruption 130."""
    try:
        run()
    except SecateurError as error:
        print(f"secateur: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"secateur: {in_one_line(error)}.", file=sys.stderr)
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
    """The entry point of the `secateur` command."""
    sys.exit(guarded(functools.partial(app, standalone_mode=True)))
