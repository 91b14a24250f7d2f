"""Weights that transformers puts together when it loads a checkpoint, in a file, not in memory.

Most weights of a loaded model are the mapped checkpoint itself. But many mixtures are stored expert
by expert, and transformers stacks the experts of a block into one tensor: a copy of nearly the
whole model. Where that would be too much for memory, each such tensor is moved to a mapped file as
soon as it is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers.core_model_loading import WeightConverter

from secateur.models.mapped_tensors import HiddenStateStore
from secateur.system.machine import CPU
from secateur.system.memory import available_bytes

SMALL = 2**20
"""Tensors of fewer bytes stay in memory."""


def too_large(checkpoint_bytes: int, limit: int | None = None) -> bool:
    """Whether the weights, once for each process, take over half of `limit`, or of what is free."""
    if limit is not None:
        return 2 * checkpoint_bytes > limit
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun says
    return 2 * checkpoint_bytes * processes > available_bytes(CPU)


def spill_folder(out: Path | None, checkpoint_bytes: int, limit: int | None = None) -> Path | None:
    """Where weights that are `too_large` for memory go: beside `out`, or to the temporary files."""
    if not too_large(checkpoint_bytes, limit):
        return None
    if out is None:
        return Path(gettempdir())
    return next(folder for folder in out.resolve().parents if folder.is_dir())


@contextmanager
def stacked_on_disk(folder: Path | None) -> Iterator[None]:
    """While open, what `from_pretrained` makes of several tensors goes to a file in `folder`.

    Without a folder it stays in memory. Raises DiskFull, OutputRefused.
    """
    if folder is None:
        yield
        return
    file, convert = HiddenStateStore(folder), WeightConverter.convert

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(part) for part in value]
        if not isinstance(value, Tensor) or value.nbytes < SMALL:
            return value
        if value.untyped_storage().nbytes() != value.nbytes:
            return value  # a view of what is mapped, for one
        return file.placed(value)

    def converted(self: WeightConverter, *args: Any, **options: Any) -> Any:
        result: Any = convert(self, *args, **options)
        # The first releases of transformers 5 give a tuple, with errors beside the tensors.
        tensors, *rest = result if isinstance(result, tuple) else (result,)
        tensors = {name: moved(value) for name, value in tensors.items()}
        return (tensors, *rest) if rest else tensors

    with patch.object(WeightConverter, "convert", converted):
        yield
