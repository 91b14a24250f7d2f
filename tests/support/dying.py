"""Runs that die at a given moment, for the tests and the bench that kill them: forks of this process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from itertools import count
from typing import Any

from secateur.cli import app as cli

MOMENTS = {
    "loading": "secateur.models.load.replayable",
    "copying": "shutil.copyfile",
    "beginning": "secateur.checkpoints.journal.Journal.begin",
    "statistics": "secateur.methods.statistics.Stats.of",
    "solving": "secateur.pruning.block.put",
    "writing": "secateur.checkpoints.result.Output.write",
    "syncing": "os.fsync",
    "recording": "secateur.checkpoints.journal.Journal._write",
    "hashing": "secateur.checkpoints.seal.file_sha256",
    "renaming": "pathlib.Path.rename",
    "tidying": "secateur.checkpoints.journal.Journal.remove",
}
"""By stage: the function at whose call, before or after it, the process dies."""


def dying_at(place: str, number: int, when: str) -> None:
    """Let this process die at the `number`-th call of a function, `when` is "before" or "after"."""
    owner, names = None, place.split(".")
    cut = next(cut for cut in range(len(names) - 1, 0, -1) if find_spec_of(names[:cut]))
    owner = importlib.import_module(".".join(names[:cut]))
    for name in names[cut:-1]:
        owner = getattr(owner, name)
    held = vars(owner)[names[-1]]
    real, calls = getattr(held, "__func__", held), count(1)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == number
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if last and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, names[-1], classmethod(stand_in) if isinstance(held, classmethod) else stand_in)


def find_spec_of(names: list[str]) -> bool:
    """Whether the names are those of a module."""
    try:
        return importlib.util.find_spec(".".join(names)) is not None
    except ModuleNotFoundError:
        return False


def started(arguments: list[str], die: tuple[str, int, str] | None = None, after: float | None = None) -> int:
    """Run the command in a child, which dies at a call or `after` some seconds; its exit status, negative if killed.

    A fork of this process, so that torch need not be imported every time.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 99
        try:
            sys.argv = ["secateur", *arguments]
            if die:
                dying_at(*die)
            if after is not None:
                signal.setitimer(signal.ITIMER_REAL, after)
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            status = cli.guarded(cli.app)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
