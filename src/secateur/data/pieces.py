"""Texts to one stream of token ids, in pieces: memory is that of the ids, four bytes a token.

A long text is tokenised in pieces that overlap. They are joined at a place within the overlap where
both have the same tokens, from there on and at the same characters, so the ids are those of the
text as a whole; where there is no such place, the text is tokenised as a whole.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.tokenizer import encode, tokenize

CHARACTERS = 2**19
"""Characters that are tokenised at once."""
OVERLAP, ALIKE = 2**13, 32
"""Characters that two pieces share, and how many tokens in a row must be the same there."""

Border = Callable[[PreTrainedTokenizerBase, str | Chat], list[int]]


def stream_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | Chat],
    border: Border,
    most: int | None = None,
) -> Tensor:
    """The token ids of texts `[tokens]` int32, each followed by its border.

    Once there are `most`, no further text is asked for. Raises what `encode` does.
    """
    stream = array("i")
    for some in batches(texts):
        for text, ids in zip(some, ids_of(tokenizer, some), strict=True):
            stream.extend(ids)
            stream.extend(border(tokenizer, text))
        if most is not None and len(stream) >= most:
            break
    if not stream:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(stream, dtype=torch.int32)


def batches(texts: Iterable[str | Chat]) -> Iterator[list[str | Chat]]:
    """Texts in groups of up to `CHARACTERS`; a longer one stands alone."""
    some: list[str | Chat] = []
    size = 0
    for text in texts:
        length = len(text) if isinstance(text, str) else sum(len(str(m)) for m in text.messages)
        if some and size + length > CHARACTERS:
            yield some
            some, size = [], 0
        some.append(text)
        size += length
    if some:
        yield some


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str | Chat]) -> list[Any]:
    """The ids of each of the texts, a group of `batches`, as `encode` gives them."""
    if len(texts) == 1 and isinstance(texts[0], str) and len(texts[0]) > 2 * CHARACTERS:
        return [long_ids(tokenizer, texts[0])]
    return encode(tokenizer, texts)


def long_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    """The ids of a long text, int32 or a list: those that the tokenizer gives for it as a whole."""
    if not tokenizer.is_fast:
        return encode(tokenizer, [text])[0]
    stream, start = array("i"), 0
    piece = _piece(tokenizer, text, 0)
    while start + CHARACTERS + OVERLAP < len(text):
        start += CHARACTERS
        following = _piece(tokenizer, text, start)
        places = _meeting(piece, following, start + OVERLAP // 2)
        if places is None:
            return encode(tokenizer, [text])[0]
        stream.frombytes(piece.ids[: places[0]].tobytes())
        piece = _Piece(following.ids[places[1] :], following.starts[places[1] :])
    stream.frombytes(piece.ids.tobytes())
    return stream


class _Piece(NamedTuple):
    """The ids of a piece of text, int32, and the character of the text at which each starts."""

    ids: np.ndarray
    starts: np.ndarray


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> _Piece:
    """The piece that begins at a character; what the tokenizer adds stays at the text's ends."""
    stop = start + CHARACTERS + OVERLAP
    options: Any = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    tokens = tokenize(tokenizer, [text[start:stop]], **options)
    ids = np.asarray(tokens["input_ids"][0], np.int32)
    starts = np.asarray(tokens["offset_mapping"][0], np.int64).reshape(-1, 2)[:, 0] + start
    own = np.flatnonzero(np.asarray(tokens["special_tokens_mask"][0]) == 0)
    first = own[0] if start and len(own) else 0
    last = own[-1] + 1 if stop < len(text) and len(own) else len(ids)
    return _Piece(ids[first:last], starts[first:last])


def _meeting(one: _Piece, other: _Piece, middle: int) -> tuple[int, int] | None:
    """Where two pieces go on alike, as a place in each: the first behind a character."""
    for place in range(int(np.searchsorted(one.starts, middle)), len(one.ids) - ALIKE):
        there = int(np.searchsorted(other.starts, one.starts[place]))
        if place == 0 or one.starts[place - 1] == one.starts[place]:
            continue
        mine, its = slice(place, place + ALIKE), slice(there, there + ALIKE)
        if np.array_equal(one.ids[mine], other.ids[its]) and np.array_equal(
            one.starts[mine], other.starts[its]
        ):
            return place, there
    return None
