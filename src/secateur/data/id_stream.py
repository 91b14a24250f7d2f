"""Token ids in the order in which they come: of a large text, they wait in a temporary file."""

import tempfile
import weakref
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.system.files import disk_errors

HELD = 2**22
"""How many ids lie in memory, 16 MiB."""


class IdStream:
    """Token ids, int32. Raises DiskFull or OutputRefused where the temporary file cannot be had."""

    def __init__(self) -> None:
        self._held, self._file, self._stored = array("i"), None, 0
        self._file: Any

    def __len__(self) -> int:
        return self._stored + len(self._held)

    def extend(self, ids: Iterable[int]) -> None:
        self._held.extend(ids)
        if len(self._held) > HELD:
            self._store()

    def cut(self, length: int) -> None:
        """Forget all ids but the first so many."""
        if length >= self._stored:
            del self._held[length - self._stored :]
            return
        self._held, self._stored = array("i"), length
        self._file.truncate(4 * length)
        self._file.seek(4 * length)

    def tensor(self) -> Tensor:
        """All ids, `[tokens]` int32; mapped where they lie in the file."""
        if self._file is None:
            empty = torch.empty(0, dtype=torch.int32)
            return torch.frombuffer(self._held, dtype=torch.int32) if self._held else empty
        self._store()
        return torch.from_numpy(np.memmap(self._file, np.int32, "r+", shape=(self._stored,)))

    def _store(self) -> None:
        with disk_errors(Path(tempfile.gettempdir())):
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                weakref.finalize(self, self._file.close)  # what is mapped stays
            self._held.tofile(self._file)
            self._file.flush()
        self._held, self._stored = array("i"), len(self)
