"""Random windows of more text than is worth tokenising: no two share a token.

Files in which one can go to any place (rows of JSON, plain text) are entered at random bytes: a
window is taken from the document there and those that follow. Others (packed files, tables, arrays)
are read through once and not parsed: their documents are put into groups of about the same size,
of which a random choice is kept (Vitter 1985, algorithm R), and a window is taken from each. Either
way a window is as likely at one place of the text as at another.
"""

import random
from bisect import bisect_right
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.corpora import Corpus
from secateur.data.long_text import Document, LongText
from secateur.data.pieces import Border
from secateur.data.readers import (
    Raw,
    document_of,
    is_packed,
    json_of,
    kind_of,
    line_of,
    reading,
    refuse_zeros,
)
from secateur.data.tokenizer import encode

BYTES_A_TOKEN = 16
"""Bytes of text that are set aside for a token of a window, more than nearly all text needs."""
TRIES = 20
STEP = 2**16

Refuse = Callable[[Tensor], bool]
"""Whether the tokens of a document or of a window are not wanted."""


class Span(NamedTuple):
    """A piece of text, and where in all the files it begins and ends, in bytes; `whole`: to the end
    of its document."""

    text: Document
    start: float
    stop: float
    whole: bool


class Sampling(NamedTuple):
    """How windows are drawn: how many, their length, and what is left out."""

    tokenizer: PreTrainedTokenizerBase
    border: Border
    wanted: int
    length: int
    draw: random.Random
    refuse: Refuse | None = None

    @property
    def reserve(self) -> int:
        """Bytes of text from which a window is taken."""
        return BYTES_A_TOKEN * self.length

    def leaves_out(self, ids: Tensor) -> bool:
        return self.refuse is not None and self.refuse(ids)


def sampled(sampling: Sampling, corpus: Corpus) -> tuple[list[Tensor], str]:
    """Up to `wanted` windows `[length]` int64 of a corpus, and how they were drawn, in words.

    Raises BadText.
    """
    if corpus.files and all(map(_can_be_entered, (file for file, _ in corpus.files))):
        return _entered(sampling, corpus), "at random bytes"
    groups, how = _groups(sampling, corpus), "from random groups of documents"
    windows: list[Tensor] = []
    for group in groups:
        if len(windows) == sampling.wanted:
            break
        window = _window(sampling, iter(group))
        if window is not None and not sampling.leaves_out(window[0]):
            windows.append(window[0])
    return windows, how


def _window(sampling: Sampling, spans: Iterator[Span]) -> tuple[Tensor, float, float] | None:
    """A window at a random place of some text, and between which bytes of it; None if too short."""
    shift = sampling.draw.randint(0, sampling.length)
    ids: list[int] = []
    begin, end = None, 0.0
    for span in spans:
        document = encode(sampling.tokenizer, [span.text])[0]
        if sampling.leaves_out(torch.tensor(document)):
            continue
        ids += document
        ids += sampling.border(sampling.tokenizer, span.text) if span.whole else []
        begin, end = span.start if begin is None else begin, span.stop
        if len(ids) >= shift + sampling.length:
            break
    if begin is None or len(ids) < sampling.length:
        return None
    start = min(shift, len(ids) - sampling.length)
    window = torch.tensor(ids[start : start + sampling.length], dtype=torch.int64)
    return window, begin, end


def _can_be_entered(file: Path) -> bool:
    """Whether documents of a file can be read from any byte of it on."""
    if is_packed(file) or kind_of(file) == "parquet":
        return False
    with reading(file), file.open("rb") as stream:
        start = stream.read(4)
    array = kind_of(file) == "rows" and start.removeprefix(BOM_UTF8).startswith(b"[")
    return not (array or start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)))


def _entered(sampling: Sampling, corpus: Corpus) -> list[Tensor]:
    """Windows at random bytes of the files, which do not overlap."""
    sizes = [file.stat().st_size for file, _ in corpus.files]
    ends = list(accumulate(sizes))
    windows: list[Tensor] = []
    taken: list[tuple[float, float]] = []
    for _ in range(TRIES * sampling.wanted):
        place = sampling.draw.randrange(ends[-1])
        window = _window(sampling, _spans(corpus, ends, place, sampling.reserve))
        if window is None or any(begin < window[2] and window[1] < end for begin, end in taken):
            continue
        taken.append(window[1:])
        if not sampling.leaves_out(window[0]):
            windows.append(window[0])
        if len(windows) == sampling.wanted:
            break
    return windows


def _spans(corpus: Corpus, ends: list[int], place: int, reserve: int) -> Iterator[Span]:
    """The text at a byte of all files, and what follows it: of a long document a piece."""
    first = bisect_right(ends, place)
    for number in range(first, len(ends)):
        file, column = corpus.files[number]
        base = ends[number - 1] if number else 0
        at = place - base if number == first else 0
        read = _rows_from if kind_of(file) == "rows" else _text_from
        with reading(file), file.open("rb") as stream:
            for span in read(stream, (file, column), at, reserve):
                yield span._replace(start=base + span.start, stop=base + span.stop)


def _rows_from(
    stream: BinaryIO, file: tuple[Path, str | None], at: int, reserve: int
) -> Iterator[Span]:
    """The document of the line at a byte, and those of the lines that follow."""
    path, column = file
    start = _line_start(stream, at)
    stream.seek(start)
    for number in count():
        line = line_of(stream, path)
        if not line:
            return
        stop = start + len(line)
        if not line.isspace():
            value = json_of(line.removeprefix(BOM_UTF8), f"at byte {start:,}", path)
            text = document_of(value, f"the row at byte {start:,} of {path}", column)
            share = (at - start) / len(line) if number == 0 else 0.0
            yield _piece(text, start, stop, share, reserve)
        start = stop


def _piece(text: Document, start: int, stop: int, share: float, reserve: int) -> Span:
    """A document that lies between two bytes; of a long text the piece at a share of it.

    Characters are taken to lie evenly between the bytes: pieces that do not overlap in the one do
    not in the other.
    """
    if isinstance(text, Chat) or len(text) <= 2 * reserve:
        return Span(text, start, stop, True)
    begin = int(share * len(text))
    end = min(begin + reserve, len(text))
    scale = (stop - start) / len(text)
    return Span(text[begin:end], start + begin * scale, start + end * scale, end == len(text))


def _text_from(
    stream: BinaryIO, file: tuple[Path, str | None], at: int, reserve: int
) -> Iterator[Span]:
    """The text of a file that is one document: all of it, or from the line after a byte on."""
    size = stream.seek(0, 2)
    if size <= 2 * reserve:
        stream.seek(0)
        text = _decoded(stream.read(), file[0])
        yield Span(text, 0, size, True)
        return
    stream.seek(at)
    data = stream.read(reserve)
    feed = data.find(b"\n", 0, reserve // 2) if at else -1
    skipped = feed + 1 or next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    whole = at + len(data) == size
    cut = len(data) if whole else _whole_characters(data)
    text = _decoded(data[skipped:cut], file[0])
    yield Span(text, at + skipped, at + cut, whole)


def _decoded(data: bytes, file: Path) -> str:
    text = data.removeprefix(BOM_UTF8).decode()
    return refuse_zeros(text, file).replace("\r\n", "\n").replace("\r", "\n")


def _whole_characters(data: bytes) -> int:
    """How many bytes of UTF-8 are whole characters: the last may be cut."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if needed == back else len(data) - back
    return len(data)


def _line_start(stream: BinaryIO, at: int) -> int:
    """The byte at which the line of a byte begins."""
    stop = at
    while stop > 0:
        start = max(stop - STEP, 0)
        stream.seek(start)
        feed = stream.read(stop - start).rfind(b"\n")
        if feed >= 0:
            return start + feed + 1
        stop = start
    return 0


class _Group:
    """Documents that lie one after another, of which one window is taken."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.size = 0

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)


def _groups(sampling: Sampling, corpus: Corpus) -> list[_Group]:
    """A random choice of all groups, in a random order: more than windows are wanted."""
    most = 2 * sampling.wanted if sampling.wanted <= 512 else sampling.wanted * 5 // 4
    kept: list[_Group] = []
    number, group, wanted = 0, _Group(), True

    for size, parse in _documents(corpus):
        for share, part in _shares(size, sampling.reserve):
            if not group.size:  # a new one: algorithm R says whether it is kept, and for which
                place = number if number < most else sampling.draw.randint(0, number)
                wanted, number = place < most, number + 1
                if wanted:
                    kept[place : place + 1] = [group]
            group.size += part
            if wanted:
                span = _part(parse(), share, part / size)
                group.spans += [span] if span else []
            if group.size >= sampling.reserve:
                group = _Group()
    sampling.draw.shuffle(kept)
    return kept


def _documents(corpus: Corpus) -> Iterator[Raw]:
    for text in corpus.texts:
        yield Raw(max(len(str(text)), 1), lambda text=text: text)
    yield from corpus.raw()


def _shares(size: int, reserve: int) -> Iterator[tuple[float, int]]:
    """Where the parts of a document begin, as a share of it, and their sizes: one, but of a long
    one many."""
    if size <= 2 * reserve:
        yield 0.0, max(size, 1)
        return
    parts = size // reserve
    for part in range(parts):
        begin, end = part * size // parts, (part + 1) * size // parts
        yield begin / size, end - begin


def _part(text: Document, share: float, part: float) -> Span | None:
    """The part of a document that begins at a share of it; a conversation is whole or nothing."""
    if part == 1 or isinstance(text, Chat):
        return None if share else Span(text, 0, 0, True)
    begin, end = round(share * len(text)), round((share + part) * len(text))
    goes_on = isinstance(text, LongText) and text.unfinished
    return Span(text[begin:end], 0, 0, end == len(text) and not goes_on)
