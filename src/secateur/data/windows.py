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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.corpora import Corpus, corpus_of
from secateur.data.long_text import Document, LongText
from secateur.data.overlap import Marks
from secateur.data.pieces import stream_of
from secateur.errors import BadText, NotEnoughText
from secateur.system.memory import available_bytes
from secateur.system.sizes import in_words


@dataclass(frozen=True)
class Part:
    """What a mixture has of one text: its share of all tokens, and as `Windows` has it."""

    source: str
    split: str
    share: float
    samples: int
    tokens: int
    available_tokens: int | None
    drawn: str | None


@dataclass(frozen=True)
class Windows:
    """Token windows `ids` `[samples, length]` int64, and what it takes to draw them again.

    `drawn` says how where not all of the text was tokenised; `parts` are those of a mixture.
    `bos`: where BOS stands (`reader.WAYS`). `counted` `[samples, length]` bool: the tokens that
    statistics are taken on; None for all. `generated`: how a model made them itself, if it did.
    """

    ids: Tensor
    source: str
    split: str
    seed: int | None
    available_tokens: int | None
    drawn: str | None = None
    parts: tuple[Part, ...] = ()
    bos: str = "stream"
    counted: Tensor | None = None
    generated: Mapping[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Everything that identifies these tokens, for a report."""
        identity = {
            "source": self.source,
            "split": self.split,
            "samples": self.ids.shape[0],
            "length": self.ids.shape[1],
            "seed": self.seed,
            "available_tokens": self.available_tokens,
            "sha256": hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest(),
            **({} if self.bos == "stream" else {"bos": self.bos}),
            **self._counted(),
            **({"generated": dict(self.generated)} if self.generated else {}),
        }
        if self.drawn:
            identity["drawn"] = self.drawn
        if self.parts:
            identity["parts"] = [asdict(part) for part in self.parts]
        return identity

    def record(self) -> dict[str, Any]:
        """The fingerprint, and by what other text can be compared with these tokens."""
        return self.fingerprint() | {"marks": Marks.of(self.ids).model_dump()}

    def empty_in_words(self) -> str:
        """A sentence on windows in which no token counts; nothing where there are none."""
        empty = 0 if self.counted is None else int((~self.counted.any(1)).sum())
        return f"{empty} of {len(self.ids)} windows hold no token that counts." if empty else ""

    def _counted(self) -> dict[str, Any]:
        if self.counted is None:
            return {}
        empty = int((~self.counted.any(1)).sum())
        tokens = int(self.counted.sum())
        return {"counted": "assistant", "counted_tokens": tokens, "empty_windows": empty}


def parts_in_words(text: Mapping[str, Any]) -> str:
    """What a mixture has of each text, from its fingerprint; nothing where it is none."""
    return "; ".join(
        f"{part['source']} {part['share']:.1%}: {part['samples']} windows, "
        f"{part['tokens']:,} tokens"
        for part in text.get("parts", ())
    )


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
    corpus = corpus_of(source, split, data_dir)
    most = length * windows if windows and corpus.is_large(0) else None
    if corpus.is_large(0) and not windows:
        _check_memory(corpus, source)
    stream = encoded(tokenizer, corpus, most)
    count = len(stream) // length
    if count < max(windows or 0, 2):
        raise NotEnoughText(
            f"{windows or 2} evaluation windows of {length} tokens were wanted; {source} "
            f"({corpus.split}) has {len(stream):,} tokens, {count} windows. Use a smaller "
            "--windows or --seq-len."
        )
    ids = stream[: count * length].view(count, length)[:windows].to(torch.int64)
    available = None if most else len(stream)
    return Windows(ids.contiguous(), source, corpus.split, None, available)


def _check_memory(corpus: Corpus, source: str) -> None:
    """Raise BadText where a text whose tokens are all wanted does not fit into memory."""
    if corpus.more:
        raise BadText(f"{source} is longer than what is read of a data set. Use --windows.")
    free = available_bytes(torch.device("cpu"))
    size = corpus.text_bytes(free)  # about a token for four bytes, as int32 and as int64
    if 3 * size > free:
        raise BadText(
            f"The tokens of all of {source} do not fit into memory, of which {in_words(free)} are "
            "free. Use --windows; then no more than that is read."
        )


def encoded(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, most: int | None = None) -> Tensor:
    """A corpus as one stream of token ids `[tokens]` int32; at least `most` where there are."""
    texts = corpus.documents()
    if corpus.source.corpus == "wikitext2":
        lines = list(texts)
        texts = iter([joined(lines)] if lines else [])
        return stream_of(tokenizer, texts, lambda *_: [], most)
    return stream_of(tokenizer, texts, border_of, most)


def joined(texts: Sequence[Document]) -> str:
    """The lines of WikiText-2 as one text, as the papers have it. Raises BadText for messages."""
    for text in texts:
        if isinstance(text, Chat):
            raise BadText(f"{text.where} is a conversation; wikitext2 is lines of one text.")
    return "\n\n".join(map(str, texts))


def border_of(tokenizer: PreTrainedTokenizerBase, text: Document) -> list[int]:
    """What follows a document of a stream: the end-of-text token, or nothing if texts are marked by
    the tokenizer itself, or by a chat template, and where the document goes on.
    """
    if isinstance(text, Chat) or (isinstance(text, LongText) and text.unfinished):
        return []
    marked = tokenizer.num_special_tokens_to_add() > 0 or tokenizer.eos_token_id is None
    return [] if marked else [int(tokenizer.eos_token_id)]  # type: ignore[arg-type]
