"""The text that a model recovers on: windows that it was not calibrated or judged on."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.corpora import corpus_of, corpus_texts
from secateur.data.long_text import Document
from secateur.data.overlap import KnownRuns, run_length
from secateur.data.pieces import batches, ids_of
from secateur.data.sampling import Sampling, sampled
from secateur.data.windows import Windows, border_of, joined
from secateur.errors import NotEnoughText


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
    known = KnownRuns(avoid)
    size = run_length(length, avoid)
    corpus = corpus_of(source, split, data_dir, seed)
    if corpus.is_large(count * length):

        def refuse(ids: Tensor) -> bool:
            return known.has(ids, min(size, len(ids)))

        sampling = Sampling(tokenizer, border_of, count, length, random.Random(seed), refuse)
        some, drawn = sampled(sampling, corpus)
        if len(some) == count:
            return Windows(torch.stack(some), source, corpus.split, seed, None, drawn)
    windows: list[Tensor] = []
    seen = 0
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
            return Windows(torch.stack(windows), source, corpus.split, seed, None)
    overlapping = seen - len(windows)
    raise NotEnoughText(
        f"Recovery was asked to see {count * length:,} tokens; {source} ({corpus.split}) has "
        f"{len(windows) * length:,} in windows of {length}"
        + (f", after {overlapping} that overlap other text" if overlapping else "")
        + ". Use fewer --steps, a smaller --batch-size, or more text."
    )


def _documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of a corpus as token ids, in a random order, and what follows each."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for some in batches(texts[number] for number in order):
        for text, ids in zip(some, ids_of(tokenizer, some), strict=True):
            yield torch.as_tensor(ids, dtype=torch.int64), torch.tensor(border_of(tokenizer, text))


def _windows(documents: Iterable[tuple[Tensor, Tensor]], length: int) -> Iterator[Tensor]:
    """The documents, each with what follows it, cut into windows that do not overlap."""
    rest = torch.empty(0, dtype=torch.int64)
    for document, border in documents:
        rest = torch.cat([rest, document, border.to(torch.int64)])
        whole = len(rest) // length * length
        yield from rest[:whole].view(-1, length)
        rest = rest[whole:]
