"""A model run block by block over evaluation windows, a group of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.models.replay import LanguageModel, Shell
from secateur.models.stream.forward import final_hidden
from secateur.system.files import disk_errors, reserve


@dataclass
class Forward:
    """A model and how it is run over windows `[windows, length]`, in groups that fit in memory.

    With `spill`, the last hidden states are kept in that file after the first pass and read from
    then on.
    """

    language_model: LanguageModel
    tokens: Tensor
    device: torch.device
    dtype: torch.dtype | None
    batch_size: int
    spill: Path | None = None
    group: int = field(init=False)
    shell: Shell = field(init=False)
    spilled: np.memmap | None = field(init=False, default=None)
    done: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.group = max(self.batch_size, 65536 // self.tokens.shape[1])
        self.shell = Shell(self.language_model, self.device, self.dtype)

    @property
    def vocabulary(self) -> int:
        return self.language_model.text_config.vocab_size

    def of(self, other: LanguageModel) -> Forward:
        """Another model, run over the same windows in the same way."""
        return Forward(other, self.tokens, self.device, self.dtype, self.batch_size)

    def on(self, tokens: Tensor) -> Forward:
        """The same model, run over other windows."""
        return Forward(self.language_model, tokens, self.device, self.dtype, self.batch_size)

    def groups(self) -> Iterator[slice]:
        for start in range(0, len(self.tokens), self.group):
            yield slice(start, min(start + self.group, len(self.tokens)))

    def hidden(self, windows: slice) -> Tensor:
        """What the last block returns, `[…, windows, length, hidden]`."""
        if windows.start in self.done and self.spilled is not None:
            return torch.from_numpy(self.spilled[..., windows, :, :].copy())
        hidden = final_hidden(
            self.language_model, self.shell, self.tokens[windows], self.dtype, self.batch_size
        )
        if self.spill and hidden.dtype == torch.float32:
            if self.spilled is None:
                shape = (*hidden.shape[:-3], len(self.tokens), *hidden.shape[-2:])
                self.spilled = self._reserve(self.spill, shape)
            self.spilled[..., windows, :, :] = hidden.numpy()
            self.done.add(windows.start)
        return hidden

    def _reserve(self, file: Path, shape: tuple[int, ...]) -> np.memmap:
        """A float32 file whose space is taken at once: on a full disk, a mapped hole is a crash."""
        with disk_errors(file), file.open("wb") as stream:
            reserve(stream.fileno(), 0, 4 * int(np.prod(shape)))
        return np.memmap(file, np.float32, "r+", shape=shape)

    def logits(self, windows: slice, hidden: Tensor) -> Tensor:
        """Next-token logits `[windows, length - 1, vocabulary]` float32."""
        return self.shell.leave(self.tokens[windows], hidden.to(self.device))[:, :-1].float()


def mean_loss(log_q: Tensor, target: Tensor) -> Tensor:
    """The mean loss of each window in nats, float64, from log-probabilities and `target` tokens
    `[windows, length - 1, 1]`.
    """
    return -log_q.gather(-1, target)[..., 0].double().mean(1).cpu()
