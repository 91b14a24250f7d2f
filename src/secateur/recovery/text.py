"""The text that a model recovers on: windows of a stream of documents, none of which was calibrated or judged on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.corpora import corpus_texts
from secateur.data import Windows, border_of, encode
from secateur.errors import NotEnoughText

RUN = 64
"""A window that shares so many consecutive tokens with text that it must not have is left out; shorter ones in full."""
AT_ONCE = 64


def recovery_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    count: int,
    length: int,
    seed: int,
    avoid: Sequence[Tensor] = (),
    data_dir: Path | None = None,
) -> Windows:
    """`count` windows of `length` tokens, no token twice, from documents in an order that `seed` draws.

    None shares `RUN` consecutive tokens with the windows in `avoid`. Raises NotEnoughText, UnknownName, BadText.
    """
    split = "training" if source == "demo" else "train"
    known = np.unique(np.concatenate([np.empty(0, np.int64), *(_runs(ids, min(RUN, length)) for ids in avoid)]))
    found: list[Tensor] = []
    seen = 0
    for window in _windows(_documents(tokenizer, source, split, seed, data_dir), length):
        seen += 1
        if not _any_in(_runs(window[None], min(RUN, length)), known):
            found.append(window)
        if len(found) == count:
            return Windows(torch.stack(found), source, split, seed, None)
    raise NotEnoughText(
        f"Recovery was asked to see {count * length:,} tokens; {source} ({split}) has {len(found) * length:,} in "
        f"windows of {length}" + (f", after {seen - len(found)} that overlap other text" if seen > len(found) else "")
        + ". Use fewer --steps, a smaller --batch-size, or more text."
    )  # fmt: skip


def _documents(
    tokenizer: PreTrainedTokenizerBase, source: str, split: str, seed: int, data_dir: Path | None
) -> Iterator[Tensor]:
    """The documents of a corpus as token ids, in a random order; a corpus of lines is one document."""
    held = corpus_texts(source, split, data_dir)
    if source == "wikitext2":
        held = ["\n\n".join(held)]
    order = list(range(len(held)))
    random.Random(seed).shuffle(order)
    border = border_of(tokenizer)
    for start in range(0, len(order), AT_ONCE):
        for ids in encode(tokenizer, [held[number] for number in order[start : start + AT_ONCE]]):
            yield torch.tensor([*ids, *border], dtype=torch.int64)


def _windows(documents: Iterator[Tensor], length: int) -> Iterator[Tensor]:
    """The stream of documents cut into windows that do not overlap."""
    rest = torch.empty(0, dtype=torch.int64)
    for document in documents:
        rest = torch.cat([rest, document])
        whole = len(rest) // length * length
        yield from rest[:whole].view(-1, length)
        rest = rest[whole:]


def _any_in(values: np.ndarray, known: np.ndarray) -> bool:
    """Whether any of the values is among those that are known, which are sorted."""
    places = np.searchsorted(known, values)
    return bool((known[np.minimum(places, len(known) - 1)] == values).any()) if len(known) else False


def _runs(ids: Tensor, size: int) -> np.ndarray:
    """A hash of every run of `size` tokens in the rows of ids `[windows, length]`, int64: a polynomial modulo 2^64."""
    held = ids.numpy().astype(np.uint64) + np.uint64(1)
    if held.shape[1] < size:
        return np.empty(0, np.int64)
    base, found = np.uint64(0x9E3779B97F4A7C15), np.zeros((held.shape[0], held.shape[1] - size + 1), np.uint64)
    for offset in range(size):
        found = found * base + held[:, offset : offset + found.shape[1]]
    return found.reshape(-1).view(np.int64)
