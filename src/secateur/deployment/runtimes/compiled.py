"""transformers with a static cache and torch.compile: what is gained by fusing, zeros or not.

The keys and values have their full length from the beginning, so that shapes stay the same and one
step is compiled once; prefill is compiled for each length of prompt. The first call of each shape
takes long, warm-up is not timed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from secateur.deployment.runtimes.base import Running, Runtime
from secateur.deployment.runtimes.eager import bytes_read, load_model
from secateur.errors import UnsupportedModel, in_one_line

ERRORS = (RuntimeError, ValueError, TypeError)
"""What a model that cannot be compiled, or that has no static cache, fails with."""


class Compiled:
    """A transformers model as `Running`, each step compiled, keys and values in a cache of fixed
    length.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.vocabulary = model, model.config.get_text_config().vocab_size
        self.weight_bytes, self.room = bytes_read(model), 64
        self.cache: Any = None
        self.place = 0
        self._step = torch.compile(self._forward, dynamic=False)

    def _forward(self, ids: Tensor, places: Tensor) -> Tensor:
        output = self.model(
            ids,
            position_ids=places[None].expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def prefill(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        wanted = (batch, length + self.room)
        if self.cache is None or self.held != wanted:
            self.held = wanted
            self.cache = StaticCache(config=self.model.config, max_cache_len=wanted[1])
        self.cache.reset()
        self.place = 0
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        places = torch.arange(self.place, self.place + ids.shape[1])
        self.place += ids.shape[1]
        try:
            return self._step(ids, places)
        except ERRORS as error:
            raise UnsupportedModel(
                f"torch.compile cannot run this model: {in_one_line(error)}."
            ) from error


def missing() -> str | None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile wants a C++ compiler; install g++ or clang++"
    return None


def load(folder: Path, dtype: torch.dtype) -> Running:
    return Compiled(load_model(folder, dtype))


compiled = Runtime(missing, load)
