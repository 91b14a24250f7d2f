"""A dense model answers prompts: batches through transformers' `generate`, drawn prompt by prompt.

A token is drawn by adding Gumbel noise to the scaled logits and taking the largest (Gumbel 1954;
Maddison et al. 2014, arXiv:1411.0030), which is a draw from their softmax. The noise of a prompt
comes from a generator of its own, so that what it draws does not depend on its neighbours but for
the rounding of a batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from secateur.errors import NonFinite


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn: the temperature (0: the likeliest token), the most tokens of one, the
    tokens that end one, and the seed.
    """

    temperature: float
    tokens: int
    stop: tuple[int, ...]
    seed: int


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end what a model says."""
    config: Any = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    ids = {int(one) for one in (*named, tokenizer.eos_token_id) if one is not None}
    return tuple(sorted(ids))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, list[int]]],
    drawing: Drawing,
    advance: Callable[[int], None] = lambda step: None,
) -> list[list[int]]:
    """The token ids that a model answers to each of some prompts (number, ids), a batch of them.

    Each ends with the token that ended it, or after so many tokens. `advance(step)` is called
    before every token. Raises NonFinite.
    """
    width = max(len(ids) for _, ids in prompts)
    pad = drawing.stop[0] if drawing.stop else 0
    padded = torch.tensor([[pad] * (width - len(ids)) + ids for _, ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in prompts])
    config = GenerationConfig(
        max_new_tokens=drawing.tokens,
        do_sample=False,
        eos_token_id=list(drawing.stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    draw = _Draw(drawing, [number for number, _ in prompts], advance)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        generate: Any = model.generate
        made: Tensor = generate(
            padded.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    finally:
        model.generation_config = own
    return [_ended(row, drawing.stop) for row in made[:, width:].tolist()]


def _ended(ids: list[int], stop: Sequence[int]) -> list[int]:
    """An answer up to the first token that ends it, that included; the rest is padding."""
    ends = [place for place, token in enumerate(ids) if token in stop]
    return ids[: ends[0] + 1] if ends else ids


class _Draw(LogitsProcessor):
    """Adds to the logits of every prompt its own noise, so that the largest is a draw."""

    def __init__(
        self, drawing: Drawing, numbers: Sequence[int], advance: Callable[[int], None]
    ) -> None:
        self.temperature, self.advance, self.step = drawing.temperature, advance, 0
        self.generators = [
            torch.Generator().manual_seed(_seed(drawing.seed, one)) for one in numbers
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.advance(self.step)
        self.step += 1
        if not scores.isfinite().any(-1).all():
            raise NonFinite(
                "The dense model says NaN or Inf. Check the checkpoint with 'secateur inspect'."
            )
        if not self.temperature:
            return scores
        size = scores.shape[1]
        noise = torch.stack([torch.rand(size, generator=one) for one in self.generators])
        gumbel = -(-noise.clamp_min(1e-20).log()).log()
        return scores.float() / self.temperature + gumbel.to(scores.device)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"secateur self {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model, or a copy where it is not on that device; mapped weights are not copied before."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device == device for tensor in tensors):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors:
        moved = tensor.detach().to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return deepcopy(model, memo)
