"""Text to tokens: windows `[samples, length]` with a fingerprint, from a corpus name or from files.

Corpora: `demo` (the standard library's text), `wikitext2` and `c4` (through `datasets`, or from a
local copy under a data folder: `DIR/wikitext2/test.jsonl`, `DIR/c4/*.jsonl`, …), and files (.txt,
.jsonl, .json.gz, .parquet; rows have a `text` field or hold a conversation, see chat.py; several
are separated by commas).

c4 and wikitext2 are sampled as the SparseGPT and Wanda code does (random documents longer than the
window, one random window each; random windows of the joined text). Other corpora are cut into
windows that do not overlap, at a random shift, and a random choice of them is taken. Their
documents keep the borders that the tokenizer puts in by itself; where it puts in none, its
end-of-text token follows each document.

Perplexity is measured on the evaluation split cut into windows that do not overlap, the remainder
dropped; WikiText-2 is joined with two line feeds first, as the papers do.
"""

import hashlib
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateur.data.chat import Chat, in_template
from secateur.data.corpora import corpus_texts
from secateur.errors import BadCheckpoint, BadText, NotEnoughText, in_one_line

# What transformers raises for the files of a tokenizer, whatever it is that is wrong with them.
TOKENIZER_ERRORS = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)
_TOKENIZER_FILES = ("tokenizer", "vocab", "tekken")


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


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises BadCheckpoint where there is none."""
    if not any(
        file.name.startswith(_TOKENIZER_FILES) or file.suffix in (".model", ".tiktoken")
        for file in folder.iterdir()
    ):
        raise BadCheckpoint(
            f"{folder} has no tokenizer (tokenizer.json or the like). Copy it there."
        )
    try:
        with _rust_errors(folder), _silent():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except TOKENIZER_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise BadCheckpoint(
                f"The tokenizer of {folder} needs code of its own, which is not run unless asked "
                "for. Read that code, then add --trust-remote-code."
            ) from error
        raise BadCheckpoint(
            f"{folder} has no tokenizer that transformers can load: {in_one_line(error)}."
        ) from error
    # Of settings alone, transformers makes a tokenizer of nothing but special tokens.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)) < 2:
        raise BadCheckpoint(
            f"{folder} has no tokenizer with a vocabulary. Copy tokenizer.json or the like there."
        )
    with _silent():
        encode(tokenizer, ["a few words"])
    return tokenizer


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what the process writes: Rust prints pages about a panic, and we say it ourselves."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(os.devnull, "wb") as nothing:
            for number in kept:
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)


@contextmanager
def _rust_errors(folder: object) -> Iterator[None]:
    """Turn what Rust raises for a broken file, a bare Exception or a panic, into BadCheckpoint."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(
            f"The tokenizer of {folder} is broken: {in_one_line(error)}."
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Chat], **options: Any
) -> list[list[int]]:
    """The token ids of every text; of conversations through the chat template.

    Raises BadCheckpoint where the tokenizer cannot take them, BadText without a template.
    """
    if chats := [text for text in texts if isinstance(text, Chat)]:
        marked = encode(
            tokenizer, [in_template(tokenizer, chat) for chat in chats], add_special_tokens=False
        )
        unmarked = encode(tokenizer, [text for text in texts if isinstance(text, str)], **options)
        of_chats, others = iter(marked), iter(unmarked)
        return [next(of_chats if isinstance(text, Chat) else others) for text in texts]
    if not texts:
        return []
    plain: Any = list(texts)
    try:
        with _rust_errors(tokenizer.name_or_path):
            ids: Any = tokenizer(plain, verbose=False, **options)["input_ids"]
    except TOKENIZER_ERRORS as error:
        raise BadCheckpoint(
            f"The tokenizer of {tokenizer.name_or_path} cannot take a text: {in_one_line(error)}."
        ) from error
    return ids


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    data_dir: Path | None = None,
) -> Windows:
    """`samples` windows of `length` tokens to calibrate on. Raises NotEnoughText, UnknownName."""
    if samples < 1 or length < 2:
        raise NotEnoughText(
            f"Calibration needs at least 1 sample of 2 tokens; found {samples} of {length}."
        )
    draw = random.Random(seed)
    if source == "c4":
        ids = _windows_of_documents(
            tokenizer, corpus_texts("c4", "train", data_dir), samples, length, draw
        )
        return Windows(ids, source, "train", seed, None)
    split = "calibration" if source == "demo" else "train"
    stream = _encoded(tokenizer, source, split, data_dir)
    if len(stream) < samples * length:
        most = len(stream) // length
        fewer = f"Use {f'--samples {most}' if most else 'more text'} or a smaller --seq-len."
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {samples * length:,} tokens; {source} "
            f"({split}) has {len(stream):,}. {fewer}"
        )
    if source == "wikitext2":
        starts = [draw.randint(0, max(len(stream) - length - 1, 0)) for _ in range(samples)]
    else:
        spare = len(stream) - samples * length
        shift = draw.randint(0, min(spare, length - 1))
        tiles = (len(stream) - shift) // length
        starts = [shift + length * tile for tile in draw.sample(range(tiles), samples)]
    ids = torch.stack([stream[start : start + length] for start in starts])
    return Windows(ids, source, split, seed, len(stream))


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
    stream = _encoded(tokenizer, source, split, data_dir)
    count = len(stream) // length
    if count < max(windows or 0, 2):
        raise NotEnoughText(
            f"{windows or 2} evaluation windows of {length} tokens were wanted; {source} ({split}) "
            f"has {len(stream):,} tokens, {count} windows. Use a smaller --windows or --seq-len."
        )
    ids = stream[: count * length].view(count, length)[:windows]
    return Windows(ids.contiguous(), source, split, None, len(stream))


def _encoded(
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


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Chat],
    samples: int,
    length: int,
    draw: random.Random,
) -> Tensor:
    """One random window from each of `samples` random documents that are longer than the window."""
    windows: list[Tensor] = []
    lengths: dict[int, int] = {}
    wanted, most = samples * length, 2000 + 500 * samples  # tokens; documents that are looked at

    def long_enough() -> list[int]:
        return [tokens for tokens in lengths.values() if tokens > length]

    while len(windows) < samples:
        looked = len(lengths) == len(texts) or len(lengths) > most
        if looked and (not long_enough() or sum(long_enough()) < wanted):
            break
        number = draw.randint(0, len(texts) - 1)
        if lengths.get(number, length + 1) <= length:
            continue
        ids = encode(tokenizer, [texts[number]])[0]
        lengths[number] = len(ids)
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(torch.tensor(ids[start : start + length]))
    distinct = sum(long_enough())
    for number in range(len(texts)):  # repeated draws may have left out long documents
        if distinct >= wanted or len(lengths) > most:
            break
        if number not in lengths:
            lengths[number] = len(encode(tokenizer, [texts[number]])[0])
            distinct += lengths[number] if lengths[number] > length else 0
    if len(windows) < samples or distinct < wanted:
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {wanted:,} tokens from documents longer "
            f"than {length}; the {len(lengths):,} documents looked at have {distinct:,} in "
            f"{len(long_enough())} such documents. Use fewer --samples or a smaller --seq-len."
        )
    return torch.stack(windows)
