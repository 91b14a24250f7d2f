"""What tokenizers in Rust do with a broken file: pages on the terminal, errors of no class."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from secateur.errors import BadCheckpoint, in_one_line


@contextmanager
def silent() -> Iterator[None]:
    """Hide what the process writes: Rust prints pages about a panic, and we say it ourselves."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(os.devnull, "wb") as nothing:
            for number in kept:
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)


@contextmanager
def rust_errors(folder: object) -> Iterator[None]:
    """Turn what Rust raises for a broken file, a bare Exception or a panic, into BadCheckpoint."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(
            f"The tokenizer of {folder} is broken: {in_one_line(error)}."
        ) from error
