"""Which texts have tokens in common, found by hashes of runs of tokens."""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field
from torch import Tensor

from secateur.system.typed import Fields

RUN, LEAST = 32, 8
"""Windows that share so many consecutive tokens overlap: `RUN`, or as many as the shortest pieces
have, at least `LEAST`.
"""


MARKS, MOST_MARKS = 4, 4096
"""Hashes that are kept of each window, and of all windows unless there are more windows."""


def _whole(hashes: str) -> str:
    if len(b64decode(hashes, validate=True)) % 8:
        raise ValueError("hashes of eight bytes each were wanted")
    return hashes


class Marks(Fields):
    """Hashes of runs of `run` tokens of a text, at even distances in each of its windows.

    As pruning.json holds them: int64 of `_runs`, the lowest byte first, in base64. Another text
    that shares so many tokens in a row and a `MARKS`th of a window more has one of these runs.
    """

    run: Annotated[int, Field(ge=LEAST)]
    hashes: Annotated[str, AfterValidator(_whole)]

    @classmethod
    def of(cls, windows: Tensor) -> "Marks":
        """The marks of windows `[windows, length]`."""
        count, length = windows.shape
        size, each = run_length(length, []), max(min(MARKS, MOST_MARKS // count), 1)
        apart = -(-length // each)
        hashes = [_runs(window, size)[::apart] for window in windows]
        return cls(
            run=size, hashes=b64encode(np.concatenate(hashes).astype("<i8").tobytes()).decode()
        )

    def met(self, windows: Tensor) -> int:
        """How many windows `[windows, length]` of another text have a marked run, at least so many
        share one.
        """
        known = np.frombuffer(b64decode(self.hashes), "<i8")
        return sum(bool(np.isin(_runs(window, self.run), known).any()) for window in windows)


class KnownRuns:
    """Which runs of tokens some texts have, looked up by their hash."""

    def __init__(self, texts: Sequence[Tensor]) -> None:
        self._streams = [ids.reshape(-1) for ids in texts]
        self._tables: dict[int, np.ndarray] = {}

    def has(self, ids: Tensor, size: int | None = None) -> bool:
        """Whether any run of `size` of the tokens `[n]` is known; by default all of them as one."""
        size = size or len(ids)
        if not self._streams or not 0 < size <= len(ids):
            return False
        if size not in self._tables:
            self._tables[size] = np.unique(
                np.concatenate([_runs(stream, size) for stream in self._streams])
            )
        known, values = self._tables[size], _runs(ids, size)
        if not len(known):
            return False
        places = np.searchsorted(known, values)
        return bool((known[np.minimum(places, len(known) - 1)] == values).any())


def run_length(length: int, texts: Sequence[Tensor]) -> int:
    """How many tokens in a row two texts must share, for windows of a length and of the texts."""
    return max(min([RUN, length, *(ids.shape[1] for ids in texts)]), LEAST)


def overlapping(windows: Tensor, other: Tensor) -> int:
    """How many of the windows `[windows, length]` share a run of tokens with another text."""
    known, size = KnownRuns([other]), run_length(windows.shape[1], [other])
    return sum(known.has(window, size) for window in windows)


def sharing(windows: Tensor) -> set[int]:
    """Which of the windows `[windows, length]` share two runs of tokens in a row with another."""
    size = run_length(windows.shape[1], [])
    marks = [np.unique(_runs(window, size)[::size]) for window in windows]
    owners = np.repeat(np.arange(len(marks)), [len(one) for one in marks])
    known, first, count = np.unique(np.concatenate(marks), return_index=True, return_counts=True)
    owner = np.where(count == 1, owners[first], -1)  # of several none
    found = set[int]()
    for number, window in enumerate(windows):
        runs = _runs(window, size)
        places = np.searchsorted(known, runs).clip(max=len(known) - 1) if len(known) else runs[:0]
        if (owner[places][known[places] == runs[: len(places)]] != number).any():
            found.add(number)
    return found


def _runs(ids: Tensor, size: int) -> np.ndarray:
    """A hash of every run of `size` tokens in ids `[n]`, int64: a polynomial modulo 2^64.

    Results on disk hold some (`Marks`), so it stays what it is.
    """
    values = ids.numpy().astype(np.uint64) + np.uint64(1)
    count = max(len(values) - size + 1, 0)
    base, hashes = np.uint64(0x9E3779B97F4A7C15), np.zeros(count, np.uint64)
    for offset in range(size if count else 0):
        hashes = hashes * base + values[offset : offset + count]
    return hashes.view(np.int64)
