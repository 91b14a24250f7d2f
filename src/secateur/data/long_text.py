"""A long text in little memory, and what the documents of a corpus are.

A `str` takes up to four bytes for every character where one character wants them, and reading one
from a file takes as much again. Most texts are in UTF-8 what they are on disk.
"""

from collections.abc import Callable

from secateur.data.chat import Chat

PIECE = 2**16
"""Characters that are kept, and unpacked, together."""


class LongText:
    """A text of any length, held in UTF-8; a slice of it is a `str`.

    `unfinished`: it goes on in the next document.
    """

    def __init__(self, read: Callable[[int], str], most: int, start: str = "") -> None:
        """`start`, and what `read(characters)` gives up to `most` characters in all."""
        self.unfinished, self._size, self._pieces = False, 0, list[bytes]()
        while self._size < most:
            wanted = min(PIECE, most - self._size)
            piece, start = start + read(wanted - len(start)), ""
            self._size += len(piece)
            self._pieces.append(piece.encode())
            if len(piece) < wanted:
                break

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(self._size)
        first = start // PIECE
        text = b"".join(self._pieces[first : -(-stop // PIECE)]).decode()
        return text[start - first * PIECE : stop - first * PIECE]

    def __str__(self) -> str:
        return self[:]


Document = str | Chat | LongText
"""A document of a corpus."""
