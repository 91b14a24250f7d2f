"""Texts to one stream of token ids, in pieces: memory is that of the ids, four bytes a token.

A long text is tokenised in pieces that overlap. They are joined at a place within the overlap where
both have the same tokens, from there on and at the same characters, so the ids are those of the
text as a whole; where there is no such place, the text is tokenised as a whole.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.tokenizer import encode, tokenize

CHARACTERS = 2**18
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
    piece = _Piece.of(tokenizer, text, 0)
    read = getattr(tokenizer, "read", list)  # a Reader takes BOS out in front
    first = len(piece.ids) - len(read(piece.ids))
    while start + CHARACTERS + OVERLAP < len(text):
        start += CHARACTERS
        following = _Piece.of(tokenizer, text, start)
        places = _meeting(piece, following, start + OVERLAP // 2)
        if places is None:
            return encode(tokenizer, [text])[0]
        stream.extend(piece.ids[first : places[0]])
        piece, first = following, places[1]
    stream.extend(piece.ids[first:])
    return stream


class _Piece(NamedTuple):
    """The ids of a piece of text that begins at a character, and the tokenizer's own account."""

    ids: list[int]
    start: int
    account: Any

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> "_Piece":
        piece = text[start : start + CHARACTERS + OVERLAP]
        tokens = tokenize(getattr(tokenizer, "tokenizer", tokenizer), [piece])
        return cls(tokens["input_ids"][0], start, tokens.encodings[0])

    def token_at(self, character: int) -> int | None:
        """The first token of a character of the text."""
        return self.account.char_to_token(character - self.start)

    def begins(self, token: int) -> int | None:
        """The character of the text at which a token begins, None for one that stands for none."""
        place = self.account.token_to_chars(token)
        return None if place is None else place[0] + self.start


def _meeting(one: _Piece, other: _Piece, middle: int) -> tuple[int, int] | None:
    """Where two pieces go on alike, as a token of each: the first at or behind a character."""
    for character in range(middle, middle + OVERLAP // 4):
        mine, its = one.token_at(character), other.token_at(character)
        if not mine or not its:  # none, or the first, which nothing stands before
            continue
        if one.ids[mine : mine + ALIKE] == other.ids[its : its + ALIKE] and all(
            one.begins(mine + n) == other.begins(its + n) for n in range(-1, ALIKE)
        ):
            return mine, its
    return None
