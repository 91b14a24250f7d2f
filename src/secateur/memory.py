"""Where the activations of the calibration windows lie: how much they are, and what is done where that is too much.

Peak memory is one block, its statistics, and the activations of all windows. Of these there are two kinds: the hidden
states that enter the block, and, in one pass, what forwards hold that stand still inside it. Where both do not fit,
blocks run twice (`flow`); where the hidden states do not, they go to a file (`hidden`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from secateur.errors import UnknownName
from secateur.machine import available_bytes
from secateur.model import LanguageModel
from secateur.sites import signature, sites

PASSES = ("auto", "one", "two")


class Arrangement(NamedTuple):
    """`passes`: "one" or "two", see `prune.pruned_blocks`; `spill`: whether hidden states go to a file."""

    passes: str
    spill: bool


def check_passes(passes: str) -> None:
    """Raise UnknownName."""
    if passes not in PASSES:
        raise UnknownName("number of passes", passes, PASSES)


def arrange(
    language_model: LanguageModel,
    shape: Sequence[int],
    *,
    passes: str,
    limit: int | None,
    dtype: torch.dtype | None,
    device: torch.device,
    dense: bool,
    shares: int = 1,
) -> Arrangement:
    """How to go through windows `[samples, length]` so that activations take at most `limit` bytes.

    Without a limit it is half of what is free on `device` now. With `dense`, there are two streams.
    `shares`: between how many processes the windows are divided.
    """
    free = limit if limit is not None else available_bytes(device) // 2
    itemsize = (dtype or language_model.model.dtype).itemsize
    streams = prod(shape) * itemsize * (2 if dense else 1) // shares
    hidden = streams * width(language_model)
    if passes == "auto":
        passes = "one" if hidden + streams * standing(language_model) <= free else "two"
    return Arrangement(passes, hidden > free)


def width(language_model: LanguageModel) -> int:
    """Numbers of a token between blocks."""
    return language_model.model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]


def standing(language_model: LanguageModel) -> int:
    """Numbers of a token, at most about, that a forward holds where it stops inside a block; of the worst block.

    What the layers of one module give, attention or feed-forward, and twice the hidden state: as it came, and normed.
    """
    kinds = {signature(block): block for block in language_model.blocks}
    chosen = getattr(language_model.model.config.get_text_config(), "num_experts_per_tok", None) or 1
    return 2 * width(language_model) + max((_widest(block, chosen) for block in kinds.values()), default=0)


def _widest(block: nn.Module, chosen: int) -> int:
    given: dict[str, int] = {}
    for name, site in sites(block).items():
        owner, _, leaf = name.rpartition(".")
        if site.expert:
            owner = owner.rpartition(".")[0]
            if name != f"{owner}.0.{leaf}":
                continue
        given[owner] = given.get(owner, 0) + site.weight.shape[0] * (chosen if site.expert else 1)
    return max(given.values(), default=0)
