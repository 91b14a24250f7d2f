"""What a long run shows: a bar on a terminal, plain lines elsewhere, nothing when quiet.

Each line has the block, the site, the elapsed and the remaining time and the peak of anonymous
memory (what the process itself allocated; mapped checkpoint files are not counted). A thread looks
at the memory every 50 ms, so a peak shorter than that can be missed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from secateur.system.machine import release_memory

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """The anonymous resident memory of this process, or None where the system does not tell."""
    return _held("RssAnon")


def resident_bytes() -> int | None:
    """All resident memory of this process, mapped files included, or None where the system does not
    tell.
    """
    return _held("VmRSS")


def _held(what: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    return None


class PeakMemory:
    """The largest `anonymous_bytes()` between entering and leaving; `bytes` is None where it is
    unknown.

    What was freed before is given back to the system first, so that it does not count. `of` asks
    for another kind.
    """

    def __init__(self, of: Callable[[], int | None] = anonymous_bytes) -> None:
        release_memory()
        self._of, self.bytes = of, of()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        now = self._of()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._look()
        self._stop.set()
        self._thread.join()


class Progress:
    """Shows how far a run is. The base class shows nothing; `terminal` and `lines` do."""

    def begin(self, title: str) -> None:
        """A new stage starts."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of the stage are finished; `what` is at hand."""

    def end(self) -> None:
        """The run is over."""


class Lines(Progress):
    """Plain lines on standard error, for logs; at most one every few seconds within a stage."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.every = every_seconds
        self.title, self.started, self.shown, self.peak = "", perf_counter(), 0.0, 0

    def begin(self, title: str) -> None:
        self.title, self.started, self.shown = title, perf_counter(), 0.0
        print(title, file=sys.stderr, flush=True)

    def advance(self, what: str, done: int, total: int) -> None:
        self.peak = max(self.peak, anonymous_bytes() or 0)
        now = perf_counter()
        if now - self.shown < self.every and done < total:
            return
        self.shown = now
        elapsed = now - self.started
        remaining = f"{elapsed / done * (total - done):.0f} s" if done else "?"
        print(
            f"  {done}/{total} {what}  elapsed {elapsed:.0f} s  remaining {remaining}  peak memory {_gib(self.peak)}",
            file=sys.stderr,
            flush=True,
        )


class Terminal(Progress):
    """A bar on standard error."""

    def __init__(self) -> None:
        self.bar = Bar(
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = None
        self.title, self.peak = "", 0
        self.bar.start()

    def begin(self, title: str) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = None
        self.title = title

    def advance(self, what: str, done: int, total: int) -> None:
        self.peak = max(self.peak, anonymous_bytes() or 0)
        if self.task is None:
            self.task = self.bar.add_task(what, total=total, title=self.title, memory="")
        self.bar.update(
            self.task,
            completed=done,
            total=total,
            description=what,
            memory=f"peak {_gib(self.peak)}",
        )

    def end(self) -> None:
        self.bar.stop()


def show(quiet: bool) -> Progress:
    """The progress display that fits: nothing, a bar, or lines."""
    if quiet:
        return Progress()
    return Terminal() if sys.stderr.isatty() else Lines()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count else "unknown"
