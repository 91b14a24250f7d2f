"""Documents as they lie in files, one after another: what is not wanted is read over, not parsed.

A .txt, or a file of any other ending, is one document; .jsonl and .parquet hold one a row, .json
too, or an array of them. .gz, .xz, .bz2 and .zst are unpacked on the way. Marks of byte order are
no text: UTF-8 is read with and without one, UTF-16 with one.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from secateur.data.chat import FIELDS, Chat, chat_of
from secateur.data.long_text import PIECE, Document, LongText
from secateur.errors import BadText, in_one_line

LARGE = 64 * 2**20
"""Bytes of text up to which all of it is read and tokenised; of more, only what is wanted."""
LONGEST = 2**28
"""Bytes of a line, or of an item of an array, that are held at once."""
BUFFER = 2**20


class Raw(NamedTuple):
    """A document that is not parsed: its size in bytes, and what parses it or raises BadText."""

    size: int
    parse: Callable[[], Document]


def kind_of(file: Path) -> str:
    """How a file holds its documents: "parquet", "rows" of JSON or, as one document, "text"."""
    suffixes = [one for one in file.suffixes if one not in _UNPACKED]
    ending = suffixes[-1] if suffixes else ""
    return {".parquet": "parquet", ".jsonl": "rows", ".json": "rows"}.get(ending, "text")


def is_packed(file: Path) -> bool:
    return file.suffix in _UNPACKED


def _zstd(file: Path) -> Any:
    import pyarrow  # takes long to import

    return pyarrow.input_stream(str(file), compression="zstd")


_UNPACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _zstd,
    ".zstd": _zstd,
}


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file as UTF-8 bytes without a mark in front, unpacked."""
    with _UNPACKED.get(file.suffix, lambda path: path.open("rb"))(file) as raw:
        stream: Any = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, BUFFER)
        start = stream.peek(4)[:4]
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            stream = io.BufferedReader(_InUtf8(stream), BUFFER)  # type: ignore[arg-type]
        yield stream


class _InUtf8(io.RawIOBase):
    """Text in UTF-16, with a mark in front, as bytes in UTF-8."""

    def __init__(self, stream: BinaryIO) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-16", newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._rest = self._rest or self._text.read(2**16).encode()
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what readers raise into BadText, which names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadText(
            f"{file} is not text in UTF-8 ({in_one_line(error)}). Convert it first."
        ) from error
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError) as error:
        raise BadText(f"{file} cannot be read: {in_one_line(error)}.") from error


def documents_of(file: Path, column: str | None = None) -> Iterator[Raw]:
    """The documents of a file; `column` as in `Source`. Raises BadText."""
    with reading(file):
        kind = kind_of(file)
        if kind == "text":
            yield from _text(file)
        elif kind == "parquet":
            yield from _table(file, column)
        else:
            for number, (size, value) in enumerate(_values(file), 1):
                yield Raw(size, _row_parser(value, column, number, file))


def _row_parser(
    value: Callable[[], Any], column: str | None, number: int, file: Path
) -> Callable[[], str | Chat]:
    def parse() -> str | Chat:
        with reading(file):
            return document_of(value(), f"row {number} of {file}", column)

    return parse


def _text(file: Path) -> Iterator[Raw]:
    """The text of a file; of more than `LARGE` characters in pieces, the last of which ends it."""
    with opened(file) as stream:
        text, start, most = io.TextIOWrapper(stream, encoding="utf-8"), "", LARGE
        while start or most == LARGE:
            piece = LongText(text.read, most, start)
            if most == LARGE:
                refuse_zeros(piece[:8192], file)
            start, most = text.read(1), LARGE // 4
            piece.unfinished = bool(start)
            short = len(piece) <= PIECE and not start
            yield Raw(len(piece), partial(str, piece) if short else lambda piece=piece: piece)


def refuse_zeros(text: str, file: Path) -> str:
    """The text. Raises BadText where it is other data."""
    if "\0" in text[:8192]:
        raise BadText(f"{file} is no text: it holds zero bytes. Convert it, or leave it out.")
    return text


def rows(file: Path) -> Iterator[Any]:
    """The rows of a .parquet, of a JSON array, or of a file with one JSON value a line.

    Raises BadText for a line that is no JSON, else what the reader raises.
    """
    if kind_of(file) == "parquet":
        for batch in _batches(file, ()):
            yield from batch.to_pylist()
        return
    for _, value in _values(file):
        yield value()


def _batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The record batches of a .parquet, with those of the columns that it has; none means all."""
    from pyarrow import parquet  # takes long to import

    with parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as table:
        names = [name for name in table.schema_arrow.names if name in columns or not columns]
        yield from table.iter_batches(batch_size=64, columns=names, use_threads=False)


def _table(file: Path, column: str | None) -> Iterator[Raw]:
    """The documents of a .parquet."""
    number = 0
    for batch in _batches(file, _columns(column)):
        mean = batch.nbytes // max(batch.num_rows, 1)
        for row in range(batch.num_rows):
            number += 1
            cell = _cell_of(batch, row)
            yield Raw(mean, _row_parser(cell, column, number, file))


def _columns(column: str | None) -> tuple[str, ...]:
    """The columns of a table that a document may be made of."""
    return (column,) if column else ("text", *FIELDS)


def table_bytes(file: Path, column: str | None) -> int:
    """The bytes of the columns of a .parquet that documents are made of, as it says itself."""
    from pyarrow import parquet  # takes long to import

    with parquet.ParquetFile(file) as table:
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
    parts = [group.column(n) for group in groups for n in range(group.num_columns)]
    wanted = _columns(column)
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.split(".")[0] in wanted
    )


def _cell_of(batch: Any, row: int) -> Callable[[], Any]:
    return lambda: batch.slice(row, 1).to_pylist()[0]


def _values(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(bytes, what parses it) of the JSON values of a file: the items of an array, or lines."""
    with opened(file) as stream:
        if stream.peek(1)[:1] == b"[":  # type: ignore[attr-defined]
            for size, item in _items(stream, file):
                yield size, lambda item=item: item
            return
        number = 0
        while line := line_of(stream, file, number + 1):
            number += 1
            if not line.isspace():
                yield len(line), lambda line=line, number=number: json_of(line, number, file)


def line_of(stream: BinaryIO, file: Path, number: int | None = None) -> bytes:
    """The next line, empty at the end. Raises BadText for one that is longer than `LONGEST`."""
    line = stream.readline(LONGEST)
    if len(line) == LONGEST and not line.endswith(b"\n"):
        which = "A line" if number is None else f"Line {number}"
        raise BadText(
            f"{which} of {file} is longer than {LONGEST // 2**20} MiB; a document a line was "
            "wanted. Split it, or name the file .txt if it is one text."
        )
    return line


def json_of(line: bytes, number: int | str, file: Path) -> Any:
    """The value of a line. Raises BadText where it is no JSON."""
    text = line.decode()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadText(f"Line {number} of {file} is no JSON: {in_one_line(error)}.") from error


def _items(stream: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """(size, value) of the items of an array of JSON, of which only one is held at a time."""
    more, text, place, first = codecs.getincrementaldecoder("utf-8")(), "", 0, True
    stream.read(1)  # the bracket
    while True:
        data = stream.read(max(BUFFER, len(text)))
        text, place = text[place:] + more.decode(data, final=not data), 0
        while (item := _item(text, place, last=not data, first=first)) is not None:
            value, stop = item
            if value is not _END:
                yield stop - place, value
            if text[stop] == "]":
                return
            place, first = stop + 1, False
        if len(text) - place > LONGEST:
            raise BadText(f"An item of {file} is longer than {LONGEST // 2**20} MiB. Split it.")


_END = object()


def _item(text: str, place: int, *, last: bool, first: bool) -> tuple[Any, int] | None:
    """An item and the place of what follows it, a comma or the bracket; None if more is wanted."""
    start = _after_blanks(text, place)
    if first and text[start : start + 1] == "]":
        return _END, start
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
        stop = _after_blanks(text, stop)
        if text[stop : stop + 1] not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
    except json.JSONDecodeError:
        if last:
            raise
        return None
    return value, stop


def _after_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def document_of(row: Any, where: str, column: str | None = None) -> str | Chat:
    """The text or the conversation of a row. Raises BadText."""
    if isinstance(row, str) and column is None:
        row = {"text": row}
    if not isinstance(row, dict):
        raise BadText(f"Every row needs a field 'text' or 'messages'; {where} has none.")
    name = column or "text"
    if name not in row:
        if column is None and (chat := chat_of(row, where)):
            return chat
        known = f"; it has {', '.join(map(repr, list(row)[:5]))}" if row else ""
        wanted = repr(column) if column else "'text' or 'messages'"
        raise BadText(f"Every row needs a field {wanted}; {where} has none{known}.")
    text = row[name]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise BadText(f"The field {name!r} must hold a string; in {where} it holds {kind}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"The text of {where} cannot be encoded: {in_one_line(error)}.") from error
    return text
