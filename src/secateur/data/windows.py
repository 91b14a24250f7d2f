"""Text to tokens: windows `[samples, length]` with a fingerprint, from a corpus name or from files.

Corpora: `demo` (the standard library's text), `wikitext2` and `c4` (through `datasets`, or from a
local copy under a data folder: `DIR/wikitext2/test.jsonl`, `DIR/c4/*.jsonl`, …), and files (.txt,
.jsonl, .json.gz, .parquet; rows have a `text` field or hold a conversation, see chat.py; several
are separated by commas).

Documents keep the borders that the tokenizer puts in by itself; where it puts in none, its
end-of-text token follows each document.

Perplexity is measured on the evaluation split cut into windows that do not overlap, the remainder
dropped; WikiText-2 is joined with two line feeds first, as the papers do. What a model is
calibrated on is drawn in calibration.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.corpora import corpus_texts
from secateur.data.tokenizer import encode
from secateur.errors import BadText, NotEnoughText


@dataclass(frozen=True)
class Windows:
    """Token windows `ids` `[samples, length]` int64, and what it takes to draw them again."""

    ids: Tensor
    source: str
    split: str
    seed: int | None
    available_tokens: int | None

    def fingerprint(self) -> dict[str, Any]:
        """Everything that identifies these tokens, for a report."""
        return {
            "source": self.source,
            "split": self.split,
            "samples": self.ids.shape[0],
            "length": self.ids.shape[1],
            "seed": self.seed,
            "available_tokens": self.available_tokens,
            "sha256": hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest(),
        }


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    length: int,
    windows: int | None = None,
    data_dir: Path | None = None,
) -> Windows:
    """`windows` windows of `length` tokens to evaluate on, None for all. Raises NotEnoughText."""
    if length < 2 or (windows is not None and windows < 2):
        raise NotEnoughText(
            f"Evaluation needs at least 2 windows of 2 tokens; found {windows or 'all'} of "
            f"{length}."
        )
    split = {"demo": "evaluation", "c4": "validation"}.get(source, "test")
    stream = encoded(tokenizer, source, split, data_dir)
    count = len(stream) // length
    if count < max(windows or 0, 2):
        raise NotEnoughText(
            f"{windows or 2} evaluation windows of {length} tokens were wanted; {source} ({split}) "
            f"has {len(stream):,} tokens, {count} windows. Use a smaller --windows or --seq-len."
        )
    ids = stream[: count * length].view(count, length)[:windows]
    return Windows(ids.contiguous(), source, split, None, len(stream))


def encoded(
    tokenizer: PreTrainedTokenizerBase, source: str, split: str, data_dir: Path | None
) -> Tensor:
    """A corpus as one stream of token ids, int64."""
    texts = corpus_texts(source, split, data_dir)
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    if source == "wikitext2":
        return torch.tensor(encode(tokenizer, [joined(texts)])[0], dtype=torch.int64)
    pieces = [
        np.asarray([*ids, *border_of(tokenizer, text)], dtype=np.int64)
        for ids, text in zip(encode(tokenizer, texts), texts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(pieces))


def joined(texts: Sequence[str | Chat]) -> str:
    """The lines of WikiText-2 as one text, as the papers have it. Raises BadText for messages."""
    for text in texts:
        if isinstance(text, Chat):
            raise BadText(f"{text.where} is a conversation; wikitext2 is lines of one text.")
    return "\n\n".join(map(str, texts))


def border_of(tokenizer: PreTrainedTokenizerBase, text: str | Chat) -> list[int]:
    """What follows a document of a stream: the end-of-text token, or nothing if texts are marked by
    the tokenizer itself, or by a chat template.
    """
    if isinstance(text, Chat):
        return []
    marked = tokenizer.num_special_tokens_to_add() > 0 or tokenizer.eos_token_id is None
    return [] if marked else [int(tokenizer.eos_token_id)]  # type: ignore[arg-type]
