"""Tensors that a run works on, as hidden states by batch: in memory, or in a file if too many."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from secateur.system.files import disk_errors, reserve

ALIGNED = 64
"""Every tensor begins at a multiple of this."""
MOST_ROOM = 2**30
"""What is reserved at a time, at most: else as much as is there, so that mappings stay few."""


def hidden_bytes(shape: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """What the hidden states of windows `[samples, length]` take, `width` numbers a token."""
    return prod(shape) * width * dtype.itemsize


class HiddenStateStore:
    """What enters the block at hand, a tensor for each batch; setting one forgets the one before.

    With `folder`, they lie in a mapped file there, which has no name and goes with the process: the
    system writes out what memory cannot hold. A batch keeps its shape and dtype from block to
    block. Raises DiskFull, OutputRefused.
    """

    def __init__(self, folder: Path | None, tensors: Iterable[Tensor] = ()) -> None:
        self.folder, self._file = folder, None
        if folder:
            with disk_errors(folder):
                self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
            finalize(self, self._file.close)
        self._end, self._room = 0, torch.empty(0, dtype=torch.uint8)
        self._tensors: list[Tensor] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        self._tensors.append(self.placed(tensor))

    def placed(self, tensor: Tensor) -> Tensor:
        """The tensor where this keeps what it is given, and does not keep it itself."""
        return self._mapped(tensor) if self._file else tensor

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy in the file. A mapping costs a file descriptor, so several tensors share one."""
        assert self._file is not None
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if size > len(self._room):
            room = max(size, min(self._end, MOST_ROOM))
            with disk_errors(self.folder or Path()):
                reserve(self._file.fileno(), self._end, room)
                file = np.memmap(self._file, np.uint8, "r+", self._end, (room,))
                self._room = torch.from_numpy(file)
            self._end += room
        mapped, self._room = self._room[: tensor.nbytes], self._room[size:]
        return mapped.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def __getitem__(self, number: int) -> Tensor:
        return self._tensors[number]

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        if self._file:
            self._tensors[number].copy_(tensor)
        else:
            self._tensors[number] = tensor

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)
