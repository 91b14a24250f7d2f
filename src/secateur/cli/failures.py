"""What the command line says of an error, and the exit code: 2 for the user's mistakes, 130 for an
interruption, 70 for a fault of ours.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from tempfile import NamedTemporaryFile
from typing import Any

from secateur.cli.terminal import command, first_process
from secateur.errors import Interrupted, RankLost, SecateurError, in_one_line, printable

MISTAKE, FAULT, INTERRUPTED = 2, 70, 130
GRACE_SECONDS = 2.0


def guarded(run: Callable[[], Any]) -> int:
    """Run the command line; its exit code. No traceback is printed, whatever happens."""
    try:
        run()
    except SecateurError as error:
        if first_process() or isinstance(error, RankLost):
            _say(str(error))
        else:  # torchrun ends the others as soon as one has left: the first says it before
            time.sleep(GRACE_SECONDS)
        return INTERRUPTED if isinstance(error, Interrupted) else MISTAKE
    except OSError as error:
        _say(f"{in_one_line(error)}.")
        return MISTAKE
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as left:
        if left.code != INTERRUPTED:
            raise
        return _interrupted()  # typer has caught the interruption
    except Exception as error:  # the outermost place: nobody else can say it
        if memory_ran_out(error):
            _say(
                f"There was not enough memory ({in_one_line(error)}). Lower --batch-size or "
                "--seq-len, bound the run with --memory, or use a machine with more."
            )
            return MISTAKE
        _say(_fault(error))
        return FAULT
    return 0


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the processor or on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _fault(error: BaseException) -> str:
    """A sentence on an error that should not have come so far, and where its traceback lies."""
    told = f"{type(error).__name__}: {in_one_line(error)}"
    try:
        with NamedTemporaryFile(
            "w", prefix="secateur-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(" ".join(command()) + "\n")
            file.writelines(traceback.format_exception(error))
        where = f"Its traceback is in {file.name}; please report it with the command"
    except OSError as failed:
        where = f"Its traceback could not be written ({in_one_line(failed)})"
    return f"This is a fault of Secateur and not yours: {told}. {where}."


def _interrupted() -> int:
    _say("interrupted; nothing unfinished was left behind.")
    return INTERRUPTED


def _say(text: str) -> None:
    print(f"secateur: {printable(text)}", file=sys.stderr)
