"""The command that fine-tunes a pruned checkpoint and keeps its zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from secateur.cli.arguments import AsJson, DataDir, Device, Out, Quiet, RemoteCode, Restart, SeqLen
from secateur.cli.terminal import command, console, display, print_json

if TYPE_CHECKING:
    from secateur.recovery.job import Recovery


def recover(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="A folder that prune, or recover, has written.")],
    out: Out = ...,  # type: ignore[assignment]
    dense: Annotated[str | None, typer.Option(help="The model that was pruned; what distills aims at it.")] = None,
    way: Annotated[
        str,
        typer.Option(
            "--with", help="lora, masked, distill, lora+distill, masked+distill (the same as distill) or blocks."
        ),
    ] = "lora",
    text: Annotated[
        str | None, typer.Option(help="Text to train on: c4, wikitext2, demo, or files separated by commas.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Text that will judge the result, and is not trained on: as for --text.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser; of each block with blocks.")] = 500,
    seq_len: SeqLen = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a forward pass, on each device.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes of a step.")] = 1,
    rate: Annotated[float | None, typer.Option(help="The highest rate. Default: by the model's width.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="The rank of adapters.")] = 16,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints of the training.")] = 100,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the text, its order and the adapters.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="What is multiplied: float32, bfloat16 (under autocast), auto: bfloat16 for what is stored in 16 bits "
            "where the device multiplies it. Weights are trained in float32."
        ),
    ] = "auto",
    data_dir: DataDir = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")] = False,
    restart: Restart = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pruned model so that its zeros stay; the mask at the end is the mask at the beginning."""
    import secateur

    with display(quiet) as shows:
        done = secateur.recover(
            model, out=out, dense=dense, way=way, text=text, evaluation=evaluation, steps=steps, seq_len=seq_len,
            batch_size=batch_size, accumulate=accumulate, rate=rate, rank=rank, save_every=save_every,
            gradient_checkpointing=gradient_checkpointing, seed=seed, device=device, dtype=dtype,
            data_dir=data_dir, overwrite=overwrite, restart=restart, trust_remote_code=trust_remote_code,
            command=command(), progress=shows,
        )  # fmt: skip
    if as_json:
        return print_json(done)
    console().print(
        f"{escape(done.way)}: {done.steps} steps, {done.tokens:,} tokens, {done.seconds:.0f} s; {_trained(done)}. "
        f"Every zero is where it was. Written to {escape(str(out))}."
    )
    if not done.apart:
        console().print("The calibration text could not be drawn again, so whether it is part of --text was not seen.")
    return None


def _trained(done: Recovery) -> str:
    """What training came to, in words."""
    if done.blocks:
        before, after = (sum(part) / len(part) for part in list(zip(*done.blocks, strict=True))[1:])
        return f"relative error of the blocks' outputs {before:.4f} before, {after:.4f} after, on average"
    last = [loss for _, loss in done.loss[-10:]]
    return f"loss {done.loss[0][1]:.4f} at first, {sum(last) / len(last):.4f} over the last {len(last)} steps"
