"""The commands of a comparison: `compare` makes one, `report` writes its pages again and joins several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateur.cli.arguments import (
    Align,
    AsJson,
    BatchSize,
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
    SeqLen,
    Skip,
    Tasks,
    WindowCount,
)
from secateur.cli.terminal import command, console, display, numbers, print_json, split


def compare(
    model: Model = None,
    out: Out = ...,  # type: ignore[assignment]
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "magnitude,wanda,sparsegpt",
    patterns: Annotated[
        str, typer.Option(help="Patterns, separated by commas; ranges such as 10%..80%, or 30%..60%/5%.")
    ] = "50%,4:8,2:4",
    allocate: Annotated[
        str, typer.Option(help="How sparsity is shared out, a row each: uniform, owl, error, search.")
    ] = "uniform",
    values: Annotated[
        str, typer.Option(help="As they are, and rounded to eight bits, a row each: 'as stored', 'as stored,int8'.")
    ] = "as stored",
    recover: Annotated[
        str,
        typer.Option(help="Fine-tune pruned rows, zeros kept, a row each: lora, masked, distill, blocks."),
    ] = "",
    recover_steps: Annotated[int, typer.Option(min=1, help="Steps of that, of 8 windows.")] = 500,
    recover_text: Annotated[
        str | None, typer.Option(help="Text for that: c4, wikitext2, demo, or files. Default: c4, demo for the demo.")
    ] = None,
    tolerance: Annotated[
        str | None, typer.Option(help="Find how far each method goes within so much more perplexity: 5%.")
    ] = None,
    tasks: Tasks = "",
    limit: Limit = None,
    bench: Annotated[
        str, typer.Option(help="Runtimes in which to time the rows: eager,packed,packed-int8 … Default: none.")
    ] = "",
    bench_dtype: Annotated[str, typer.Option(help="dtype of the timed models: bfloat16, float32.")] = "bfloat16",
    align: Align = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text to calibrate on: demo, c4, wikitext2, or files separated by commas. May be repeated."),
    ] = None,
    evaluation: EvaluationText = None,
    samples: Annotated[str, typer.Option(help="Calibration windows; several, as in 1,16,128, for a row each.")] = "128",
    windows: WindowCount = None,
    seq_len: SeqLen = None,
    seed: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of the calibration windows; several for a row each.")
    ] = "0",
    skip: Skip = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 8,
    passes: Passes = "auto",
    memory: Memory = None,
    data_dir: DataDir = None,
    restart: Restart = False,
    allow_low_coverage: LowCoverage = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune with every method and pattern on the same tokens, and say which is better by how much."""
    import secateur
    from secateur.evaluation.report.write import table

    with display(quiet) as shows:
        results = secateur.compare(
            model, out=out, methods=split(methods), patterns=split(patterns), allocate=split(allocate),
            values=split(values), recover=split(recover), recover_steps=recover_steps, recover_text=recover_text,
            tolerance=tolerance, tasks=split(tasks), limit=limit, bench=split(bench),
            bench_dtype=bench_dtype, align=align, calibration=calibration, evaluation=evaluation,
            samples=numbers(samples), windows=windows, seq_len=seq_len, seed=numbers(seed), skip=skip or (),
            device=device, dtype=dtype, batch_size=batch_size, passes=passes, memory=memory, data_dir=data_dir,
            restart=restart, allow_low_coverage=allow_low_coverage, trust_remote_code=trust_remote_code,
            command=command(), progress=shows,
        )  # fmt: skip
    if as_json:
        return print_json(results)
    shown = console()
    shown.print(table(results, shown.width))
    shown.print(f"Written to {escape(str(out / 'results.json'))}, report.html and report.md.")
    return None


def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or the folders of comparisons.")],
    out: Out,
) -> None:
    """Write report.html and report.md of a comparison, or of several under the same conditions as one."""
    import secateur
    from secateur.evaluation.report.write import table

    joined = secateur.report(results, out=out)
    shown = console()
    shown.print(table(joined, shown.width))
    shown.print(f"Written to {escape(str(out / 'report.html'))}, report.md and results.json.")
