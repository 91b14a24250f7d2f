"""What a quantised checkpoint is, once its weights are numbers again.

A format (`formats`) looks at the headers alone and says which tensors the plain model has and how
each is read; nothing is decoded before somebody calls `DenseTensor.read`. What is done with a
`PlainSource`, whatever it was made from, is in `unpack` and `reading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

File = Path | Callable[[Path], None]
"""A file of a plain checkpoint: one to be copied, or a function that writes it at a path."""


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the plain checkpoint that a source stands for.

    `read` decodes it, anew at each call, in the dtype that the format's own library gives; writers
    cast that. `stored` says how it is stored, for people: "NVFP4", "BF16". `stored_bytes` counts
    everything that belongs to it, scales too. `pieces` decodes the same as parts that follow one
    another in the first dimension, for tensors that are large; without it there is one.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    stored: str
    stored_bytes: int
    pieces: Callable[[], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class PlainSource:
    """A quantised checkpoint as the plain one that it stands for.

    `format` is its name for people: "block FP8 (128 x 128)". `origin` is what the user named, a
    folder or a file, and `weights` the files that hold its tensors. `config` is the config.json of
    the plain model, which says nothing of quantisation; its dtype is set by whoever writes it.
    `files` are the other files of the plain checkpoint by name: tokenizer, templates, code. Where
    all comes from one file, `identity` is what that was when it was opened.
    """

    format: str
    origin: Path
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: tuple[DenseTensor, ...]
    files: Mapping[str, File]
    identity: tuple[int, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """The bytes of all tensors as they are stored."""
        return sum(tensor.stored_bytes for tensor in self.tensors)
