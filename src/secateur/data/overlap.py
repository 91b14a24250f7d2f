"""Which texts have tokens in common, found by hashes of runs of tokens."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

RUN, LEAST = 32, 8
"""Windows that share so many consecutive tokens overlap: `RUN`, or as many as the shortest pieces
have, at least `LEAST`.
"""


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


def _runs(ids: Tensor, size: int) -> np.ndarray:
    """A hash of every run of `size` tokens in ids `[n]`, int64: a polynomial modulo 2^64."""
    values = ids.numpy().astype(np.uint64) + np.uint64(1)
    count = max(len(values) - size + 1, 0)
    base, hashes = np.uint64(0x9E3779B97F4A7C15), np.zeros(count, np.uint64)
    for offset in range(size if count else 0):
        hashes = hashes * base + values[offset : offset + count]
    return hashes.view(np.int64)
