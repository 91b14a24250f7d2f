"""transformers with a static cache and torch.compile: what is gained by fusing, zeros or not.

The keys and values have their full length from the beginning, so that shapes stay the same and one
step is compiled once; prefill is compiled for each length of prompt. The first call of each shape
takes long, warm-up is not timed.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from secateur.deployment.runtimes.base import Runtime, Stepped, load_model
from secateur.errors import UnsupportedModel, in_one_line

ERRORS = (RuntimeError, ValueError, TypeError)
"""What a model that cannot be compiled, or that has no static cache, fails with."""


class Compiled(Stepped):
    """A transformers model whose steps are compiled, with a cache of fixed length."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.position = 0
        self.cache_shape = (0, 0)  # batch, tokens
        self._step = torch.compile(self._forward, dynamic=False)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            ids,
            position_ids=positions[None].expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def prefill(self, ids: Tensor) -> Tensor:
        shape = (len(ids), ids.shape[1] + self.room)
        if self.cache_shape != shape:
            self.cache_shape = shape
            self.cache = StaticCache(config=self.model.config, max_cache_len=shape[1])
        self.cache.reset()
        self.position = 0
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self.position, self.position + ids.shape[1])
        self.position += ids.shape[1]
        try:
            return self._step(ids, positions)
        except ERRORS as error:
            raise UnsupportedModel(
                f"torch.compile cannot run this model: {in_one_line(error)}."
            ) from error


def missing() -> str | None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile wants a C++ compiler; install g++ or clang++"
    return None


def load(folder: Path, dtype: torch.dtype, **trust: Any) -> Compiled:
    return Compiled(load_model(folder, dtype, **trust))


compiled = Runtime(missing, load, runs_code=True)
