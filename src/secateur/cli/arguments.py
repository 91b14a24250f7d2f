"""The arguments that commands share, with their words of help; each is said once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Argument(help="A checkpoint folder or hub name. Default: the embedded demo.")]
Out = Annotated[Path, typer.Option(help="The folder to write.")]
Calibration = Annotated[
    str | None, typer.Option(help="Text to calibrate on: demo, c4, wikitext2, or files separated by commas.")
]
EvaluationText = Annotated[
    str | None, typer.Option("--evaluation", help="Text to measure perplexity on: as for --calibration.")
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
SeqLen = Annotated[
    int | None, typer.Option(min=2, help="Tokens a window. Default: the smaller of 2048 and the context.")
]
WindowCount = Annotated[int | None, typer.Option("--windows", min=2, help="Evaluation windows. Default: all.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration windows.")]
Align = Annotated[
    int | None,
    typer.Option(min=1, help="Channels that stay are a multiple of this; default 128, less for widths under 4096."),
]
Skip = Annotated[list[str] | None, typer.Option(help="Leave sites out: a glob on their names. May be repeated.")]
Tasks = Annotated[
    str,
    typer.Option(help="Zero-shot tasks, separated by commas: boolq,piqa … or papers, which is seven. Default: none."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task, the first ones. Default: all.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0,cuda:1 …")]
Dtype = Annotated[
    str,
    typer.Option(
        help="dtype of forward passes: auto, float32, bfloat16, float16. auto: on a CPU float32, or in calibration "
        "bfloat16 as stored if the processor multiplies it."
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Windows a forward pass; calibration takes fewer where memory is short.")
]
Passes = Annotated[str, typer.Option(help="How often blocks run: one, two (less memory), auto: one where that fits.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What the run may take, such as 6GB; hidden states go to a file if need be. Default: what is free."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard a half-finished run at --out.")]
DataDir = Annotated[Path | None, typer.Option(help="A folder with local copies of the corpora.")]
LowCoverage = Annotated[bool, typer.Option("--allow-low-coverage", help="Prune although most weights are no sites.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document last.")]
