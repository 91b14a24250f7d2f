"""What the commands share: the progress display, the console, lines and tables, JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from secateur.system.progress import Progress


def progress(quiet: bool) -> Progress:
    """The progress display, with the loading bars of the libraries turned off."""
    import datasets
    import huggingface_hub
    import transformers

    from secateur.system import progress

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(
        logging.CRITICAL
    )  # what is an error to us is raised as well, and told once
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    if quiet:
        huggingface_hub.utils.disable_progress_bars()
    return progress.show(quiet)


class display:  # noqa: N801 — used as a function
    """The progress display for a `with` block, closed whatever happens."""

    def __init__(self, quiet: bool) -> None:
        self.progress = progress(quiet)

    def __enter__(self) -> Progress:
        return self.progress

    def __exit__(self, *error: object) -> None:
        self.progress.end()


def usable_streams() -> None:
    """Let any text be printed: a character that the console does not have becomes a question mark,
    and a stream that was closed before the start swallows what it gets.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for whole tables. Of several processes
    the first speaks.
    """
    return Console(width=None if sys.stdout.isatty() else 180, quiet=not first_process())


def command() -> list[str]:
    """What was typed."""
    return ["secateur", *sys.argv[1:]]


def show(value: Any, as_json: bool, shown: Callable[[], Iterable[RenderableType]]) -> None:
    """Print a result: one JSON document, or the lines and tables that `shown` makes of it."""
    if as_json:
        return print_json(value)
    screen = console()
    for line in shown():
        screen.print(line, highlight=False, soft_wrap=isinstance(line, str))
    return None


def print_json(value: Any) -> None:
    """Print one document; dataclasses by their fields, characters that a terminal would obey as
    escapes.
    """
    if not first_process():
        return
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(plain, ensure_ascii=not unicode, allow_nan=False, default=str)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
