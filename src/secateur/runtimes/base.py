"""What a runtime is, and how a transformers model is run step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Running:
    """A loaded model that is run token by token, with its keys and values kept.

    `weight_bytes` are read for one token: all parameters but the input embedding, of which a row is looked up.
    """

    def __init__(self, model: PreTrainedModel, weight_bytes: int) -> None:
        self.model: Any = model
        self.weight_bytes = weight_bytes
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits `[batch, vocabulary]` float32 after tokens `[batch, length]`, from an empty cache."""
        self.cache = DynamicCache(config=self.model.config)
        return self._step(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """The logits after one more token for each row, `[batch, 1]`."""
        return self._step(ids)

    @torch.no_grad()
    def _step(self, ids: Tensor) -> Tensor:
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()


class Runtime(NamedTuple):
    """`missing()` says why the runtime cannot be used here, None where it can. `load` raises SecateurError."""

    missing: Callable[[], str | None]
    load: Callable[[Path, torch.dtype], Running]
