"""The command that fine-tunes a pruned checkpoint and keeps its zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

import secateur
from secateur.cli.options import AsJson, Quiet, options
from secateur.cli.terminal import command, display, show
from secateur.system.settings import Destination, Training, TrainingText, Trust

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secateur.recovery.job import Recovery


@options(Training, TrainingText, Destination, Trust, without=("allow_low_coverage",))
def recover(
    given: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="PRUNED", help="A folder that prune, or recover, has written.")
    ],
    dense: Annotated[
        str | None, typer.Option(help="The model that was pruned; what distills aims at it.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pruned model so that its zeros stay; the mask at the end is the mask at the
    beginning.
    """
    with display(quiet) as shows:
        done = secateur.recover(model, dense=dense, **given, command=command(), progress=shows)
    show(done, as_json, lambda: map(escape, _lines(done)))


def _lines(done: Recovery) -> Iterator[str]:
    yield (
        f"{done.way}: {done.steps} steps, {done.tokens:,} tokens, {done.seconds:.0f} s; {_trained(done)}. "
        f"Every zero is where it was. Written to {done.out}."
    )
    if not done.apart:
        yield "The calibration text could not be drawn again, so whether it is part of --text was not seen."


def _trained(done: Recovery) -> str:
    """What training came to, in words."""
    if done.blocks:
        before, after = (sum(part) / len(part) for part in list(zip(*done.blocks, strict=True))[1:])
        return f"relative error of the blocks' outputs {before:.4f} before, {after:.4f} after, on average"
    last = [loss for _, loss in done.loss[-10:]]
    return f"loss {done.loss[0][1]:.4f} at first, {sum(last) / len(last):.4f} over the last {len(last)} steps"
