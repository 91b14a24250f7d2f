"""What the commands share: the progress display, the console, lists in options, JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

import typer
from rich.console import Console


def progress(quiet: bool) -> Any:
    """The progress display, with the loading bars of the libraries turned off."""
    import datasets
    import transformers

    from secateur.system.progress import show

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)  # what is an error to us is raised as well, and told once
    datasets.disable_progress_bars()
    return show(quiet)


class display:  # noqa: N801 — used as a function
    """The progress display for a `with` block, closed whatever happens."""

    def __init__(self, quiet: bool) -> None:
        self.progress = progress(quiet)

    def __enter__(self) -> Any:
        return self.progress

    def __exit__(self, *error: object) -> None:
        self.progress.end()


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for whole tables. Of several processes the first speaks."""
    return Console(width=None if sys.stdout.isatty() else 180, quiet=not first_process())


def split(text: str) -> list[str]:
    """The parts of an option that is a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """The same where every part is a whole number."""
    try:
        return [int(part) for part in split(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers") from None


def command() -> list[str]:
    """What was typed."""
    return ["secateur", *sys.argv[1:]]


def print_json(value: Any) -> None:
    """Print one document; dataclasses by their fields, characters that a terminal would obey as escapes."""
    if not first_process():
        return
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str)
    print("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
