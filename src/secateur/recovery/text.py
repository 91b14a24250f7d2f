"""The text that a model recovers on: windows that it was not calibrated or judged on."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.corpora import corpus_of, corpus_texts
from secateur.data.tokenizer import encode
from secateur.data.windows import Windows, border_of, joined
from secateur.errors import NotEnoughText

RUN, LEAST = 32, 8
"""A window that shares so many consecutive tokens with text to be avoided is left out: `RUN`, or as
many as the shortest pieces have, at least `LEAST`.
"""
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
    """`count` windows of `length` tokens, no token twice, from documents in an order by `seed`.

    None shares `RUN` consecutive tokens with the text in `avoid`, `[windows, length]` each, whose
    rows may follow one another; no document that is shorter is part of it. Raises NotEnoughText,
    UnknownName, BadText.
    """
    split = "training" if source == "demo" else "train"
    known = _Known(avoid)
    size = max(min([RUN, length, *(ids.shape[1] for ids in avoid)]), LEAST)
    windows: list[Tensor] = []
    seen = 0
    corpus = corpus_of(source, split, data_dir, seed)
    texts = corpus_texts(corpus)
    if source == "wikitext2":  # its texts are lines that belong together
        texts = [joined(texts)]
    documents = _documents(tokenizer, texts, seed)
    unknown = (pair for pair in documents if len(pair[0]) >= size or not known.has(pair[0]))
    for window in _windows(unknown, length):
        seen += 1
        if not known.has(window, size):
            windows.append(window)
        if len(windows) == count:
            return Windows(torch.stack(windows), source, split, seed, None)
    overlapping = seen - len(windows)
    raise NotEnoughText(
        f"Recovery was asked to see {count * length:,} tokens; {source} ({split}) has "
        f"{len(windows) * length:,} in windows of {length}"
        + (f", after {overlapping} that overlap other text" if overlapping else "")
        + ". Use fewer --steps, a smaller --batch-size, or more text."
    )


class _Known:
    """Which runs of tokens some texts have, looked up by their hash."""

    def __init__(self, texts: Sequence[Tensor]) -> None:
        self._streams = [ids.reshape(-1) for ids in texts]
        self._tables: dict[int, np.ndarray] = {}

    def has(self, ids: Tensor, size: int | None = None) -> bool:
        """Whether any run of `size` of the tokens `[n]` is known; by default all of them as one."""
        size = size or len(ids)
        if not self._streams or not 0 < size <= len(ids):
            return False
        if size not in self._tables:
            self._tables[size] = np.unique(
                np.concatenate([_runs(stream, size) for stream in self._streams])
            )
        known, values = self._tables[size], _runs(ids, size)
        if not len(known):
            return False
        places = np.searchsorted(known, values)
        return bool((known[np.minimum(places, len(known) - 1)] == values).any())


def _documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Chat], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of a corpus as token ids, in a random order, and what follows each."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), AT_ONCE):
        some = [texts[i] for i in order[start : start + AT_ONCE]]
        for text, ids in zip(some, encode(tokenizer, some), strict=True):
            yield torch.tensor(ids, dtype=torch.int64), torch.tensor(border_of(tokenizer, text))


def _windows(documents: Iterable[tuple[Tensor, Tensor]], length: int) -> Iterator[Tensor]:
    """The documents, each with what follows it, cut into windows that do not overlap."""
    rest = torch.empty(0, dtype=torch.int64)
    for document, border in documents:
        rest = torch.cat([rest, document, border.to(torch.int64)])
        whole = len(rest) // length * length
        yield from rest[:whole].view(-1, length)
        rest = rest[whole:]


def _runs(ids: Tensor, size: int) -> np.ndarray:
    """A hash of every run of `size` tokens in ids `[n]`, int64: a polynomial modulo 2^64."""
    values = ids.numpy().astype(np.uint64) + np.uint64(1)
    count = max(len(values) - size + 1, 0)
    base, hashes = np.uint64(0x9E3779B97F4A7C15), np.zeros(count, np.uint64)
    for offset in range(size if count else 0):
        hashes = hashes * base + values[offset : offset + count]
    return hashes.view(np.int64)
