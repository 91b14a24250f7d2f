"""What a runtime is, and how a transformers model is run step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Running(Protocol):
    """A loaded model that is run token by token, with its keys and values kept.

    `weight_bytes` are read for one token: all weights but the input embedding, of which a row is
    looked up. Logits are float32 `[batch, vocabulary]`, those after the last token. `room` is set
    to the number of tokens that will be decoded after a prompt, for those that have to know.
    """

    vocabulary: int
    weight_bytes: int
    room: int

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits after tokens int64 `[batch, length]`, from an empty cache. UnsupportedModel:
        not this batch.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """The logits after one more token for each row, `[batch, 1]`."""
        ...


class Stepped:
    """A transformers model as `Running`; the cache grows with every token."""

    def __init__(self, model: PreTrainedModel, weight_bytes: int) -> None:
        self.model: Any = model
        self.vocabulary = model.config.get_text_config().vocab_size
        self.weight_bytes, self.room = weight_bytes, 64
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()


class Runtime(NamedTuple):
    """`missing()` says why the runtime cannot be used here, None where it can. `load(folder,
    dtype)` raises SecateurError; UnsupportedModel where this runtime cannot run that folder in that
    dtype.

    `twin` is the runtime that shows what its kernels give without zeros: there the dense model is
    its baseline. `rounded` says that it rounds the folder's weights to few bits, so that its
    outputs are compared loosely.
    """

    missing: Callable[[], str | None]
    load: Callable[[Path, torch.dtype], Running]
    twin: str | None = None
    rounded: bool = False
