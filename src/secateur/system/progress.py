"""What a long run shows: a bar on a terminal, plain lines elsewhere, nothing when quiet.

Each line has the block, the weight matrix, the elapsed and the remaining time and the peak of
anonymous memory (what the process itself allocated; mapped checkpoint files are not counted).
"""

import sys
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from secateur.system.memory import anonymous_bytes
from secateur.system.sizes import in_words


class Progress:
    """Shows how far a run is. The base class shows nothing; `terminal` and `lines` do."""

    def begin(self, title: str) -> None:
        """A new stage starts."""

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of the stage are finished; `what` is at hand."""

    def note(self, text: str) -> None:
        """A line that stays on the screen."""

    def end(self) -> None:
        """The run is over."""


class Lines(Progress):
    """Plain lines on standard error, for logs; at most one every few seconds within a stage."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.every = every_seconds
        self.started, self.shown, self.peak = perf_counter(), 0.0, 0

    def begin(self, title: str) -> None:
        self.started, self.shown = perf_counter(), 0.0
        print(title, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def advance(self, what: str, done: int, total: int) -> None:
        self.peak, now = max(self.peak, anonymous_bytes() or 0), perf_counter()
        if now - self.shown < self.every and done < total:
            return
        self.shown = now
        elapsed = now - self.started
        remaining = f"{elapsed / done * (total - done):.0f} s" if done else "?"
        times = f"elapsed {elapsed:.0f} s  remaining {remaining}"
        line = f"  {done}/{total} {what}  {times}  peak memory {_peak(self.peak)}"
        print(line, file=sys.stderr, flush=True)


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
        self.task, self.title, self.peak = None, "", 0
        self.bar.start()

    def begin(self, title: str) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task, self.title = None, title

    def advance(self, what: str, done: int, total: int) -> None:
        self.peak = max(self.peak, anonymous_bytes() or 0)
        if self.task is None:
            self.task = self.bar.add_task(what, total=total, title=self.title, memory="")
        memory = f"peak {_peak(self.peak)}"
        self.bar.update(self.task, completed=done, total=total, description=what, memory=memory)

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        self.bar.stop()


def show(quiet: bool) -> Progress:
    """The progress display that fits: nothing, a bar, or lines."""
    if quiet:
        return Progress()
    return Terminal() if sys.stderr.isatty() else Lines()


def _peak(count: int) -> str:
    return in_words(count, ("GiB",)) if count else "unknown"
