"""Ctrl-C during long work: the first asks to stop where nothing is lost, the second stops."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asked_to_stop(where: str) -> Iterator[Callable[[], bool]]:
    """While open, tells whether the user has asked to stop; the first Ctrl-C prints `where`.

    Outside the main thread, where Python hears no signals, nobody asks.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        message = f"secateur: stopping {where}; Ctrl-C once more stops at once."
        print(message, file=sys.stderr, flush=True)

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        if signal.getsignal(signal.SIGINT) is ask:
            signal.signal(signal.SIGINT, before)
