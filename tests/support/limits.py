"""What a case may take, and what it prints: the clock, files, memory, and both outputs of this process."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter, process_time

BUSY = 5


class TimeLimit(BaseException):
    """Raised by the clock; not an Exception, so that nobody mistakes it for a broken file."""


@contextmanager
def captured() -> Iterator[list[str]]:
    """Standard output and standard error of this process, Rust's and C's too: two texts, there after the block."""
    said: list[str] = []
    with TemporaryFile() as out, TemporaryFile() as err:
        kept, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
        for stream, number, file in ((sys.stdout, 1, out), (sys.stderr, 2, err)):
            stream.flush()
            os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            yield said
        finally:
            for stream, old in zip((sys.stdout, sys.stderr), streams, strict=True):
                stream.flush()
                old.flush()
            sys.stdout, sys.stderr = streams
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit where the block takes longer, if Python gets to run at all.

    On a machine that others use too it may take `BUSY` times as long, as long as it computes less than that.
    """
    computed, begun = process_time(), perf_counter()

    def ring(*_: object) -> None:
        if process_time() - computed >= seconds or perf_counter() - begun >= BUSY * seconds:
            raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should somebody swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forget_peak() -> None:
    """Let `peak` start anew; Linux alone has that."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory that this process held since `forget_peak`, in bytes; 0 where that is not known."""
    return _status("VmHWM")


def held() -> int:
    """The memory that this process holds, in bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
