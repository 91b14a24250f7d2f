"""Texts to one stream of token ids, in pieces: many ids wait in a file, so memory has a bound.

A long text is tokenised in pieces that overlap. They are joined at a place within the overlap where
both have the same tokens, from there on and at the same characters, so the ids are those of the
text as a whole; where there is no such place, the text is tokenised as a whole.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.id_stream import IdStream
from secateur.data.long_text import Document, LongText
from secateur.data.tokenizer import encode, tokenize

CHARACTERS = 2**18
"""Characters that are tokenised at once."""
OVERLAP, ALIKE = 2**13, 32
"""Characters that two pieces share, and how many tokens in a row must be the same there."""

Border = Callable[[PreTrainedTokenizerBase, Document], list[int]]


def stream_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Document],
    border: Border,
    most: int | None = None,
) -> Tensor:
    """The token ids of texts `[tokens]` int32, each followed by its border.

    Once there are `most`, no further text is asked for. Raises what `encode` does.
    """
    stream = IdStream()
    for some in batches(texts):
        if long := _long_text(some):
            append_long(stream, tokenizer, long)
            stream.extend(border(tokenizer, long))
        else:
            for text, ids in zip(some, encode(tokenizer, some), strict=True):
                stream.extend(ids)
                stream.extend(border(tokenizer, text))
        if most is not None and len(stream) >= most:
            break
    return stream.tensor()


def batches(texts: Iterable[Document]) -> Iterator[list[Document]]:
    """Texts in groups of up to `CHARACTERS`; a longer one stands alone."""
    some: list[Document] = []
    size = 0
    for text in texts:
        of_chat = map(len, map(str, text.messages)) if isinstance(text, Chat) else ()
        length = sum(of_chat) or len(text)
        if some and size + length > CHARACTERS:
            yield some
            some, size = [], 0
        some.append(text)
        size += length
    if some:
        yield some


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[Document]) -> list[Any]:
    """The ids of each of the texts, a group of `batches`, as `encode` gives them."""
    if (long := _long_text(texts)) is None:
        return encode(tokenizer, texts)
    append_long(stream := IdStream(), tokenizer, long)
    return [stream.tensor()]


def _long_text(texts: list[Document]) -> str | LongText | None:
    """The text of a group that is tokenised in pieces."""
    first = texts[0]
    return None if isinstance(first, Chat) or len(first) <= 2 * CHARACTERS else first


def append_long(stream: IdStream, tokenizer: PreTrainedTokenizerBase, text: str | LongText) -> None:
    """Append to ids those that the tokenizer gives for a long text as a whole."""
    before, start = len(stream), 0
    if not tokenizer.is_fast:
        stream.extend(encode(tokenizer, [text])[0])
        return
    piece = _Piece.of(tokenizer, text, 0)
    read = getattr(tokenizer, "read", list)  # a Reader takes BOS out in front
    first = len(piece.ids) - len(read(piece.ids))
    while start + CHARACTERS + OVERLAP < len(text):
        start += CHARACTERS
        following = _Piece.of(tokenizer, text, start)
        places = _meeting(piece, following, start + OVERLAP // 2)
        if places is None:
            stream.cut(before)
            stream.extend(encode(tokenizer, [text])[0])
            return
        stream.extend(piece.ids[first : places[0]])
        piece, first = following, places[1]
    stream.extend(piece.ids[first:])


class _Piece(NamedTuple):
    """The ids of a piece of text that begins at a character, and the tokenizer's own account."""

    ids: list[int]
    start: int
    account: Any

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str | LongText, start: int) -> "_Piece":
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
