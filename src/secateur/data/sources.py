"""What a user names as text, read once: corpora, files, folders, globs, data sets, and mixtures.

    c4                                       a corpus, see corpora.py
    chat.jsonl,more/*.parquet,texts/         files, globs and folders, together one corpus
    logs.jsonl:body                          rows whose text is in another field
    owner/name[subset](split):column         a data set of the hub, or of a folder
    c4:0.5,chat.jsonl:0.3,code/*.py:0.2      a mixture, by shares of the tokens

A name that is there is a name, whatever characters it has.
"""

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from secateur.errors import BadText, UnknownName, in_one_line

CORPORA = ("demo", "c4", "wikitext2")
MOST_FILES = 100_000
"""How many files may lie below a folder of text; a disk as a whole has more."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SUFFIXES += tuple(f".{kind}.{packed}" for kind in ("jsonl", "json") for packed in ("zst", "xz"))
SUFFIXES += tuple(f".txt.{packed}" for packed in ("gz", "zst", "xz"))
"""Endings of the files that are taken without being asked for by a glob."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?|[-+]?(?:nan|inf|infinity)"
_SHARE = re.compile(rf"(?P<text>.*):\s*(?P<share>{_NUMBER})\s*", re.IGNORECASE | re.DOTALL)
_QUALIFIED = re.compile(
    r"(?P<path>.+?)(?:\[(?P<subset>[^][]*)\])?(?:\((?P<split>[^()]*)\))?(?::(?P<column>[^:]+))?",
    re.DOTALL,
)
_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class DataSet(NamedTuple):
    """A data set of the hub, or of a folder, as `datasets` names it."""

    path: str
    subset: str | None
    split: str | None


@dataclass(frozen=True)
class Source:
    """Where text comes from: a corpus of `CORPORA`, files, or a data set; `text` as it was written.

    `column` is the field of a row that holds the text, None for `text` or a conversation.
    """

    text: str
    corpus: str | None = None
    files: tuple[tuple[Path, str | None], ...] = ()
    data_set: DataSet | None = None
    column: str | None = None


@dataclass(frozen=True)
class Share:
    """A part of a mixture, and its share of all tokens."""

    source: Source
    share: float


def read_source(text: str) -> Source:
    """What a text names as one corpus. Raises UnknownName, BadText."""
    shares = read_shares(text)
    if shares:
        raise BadText(
            f"{text!r} is a mixture, by shares of the tokens; it can be calibrated on. Name one "
            "corpus, or files without shares."
        )
    if text in CORPORA:
        return Source(text, corpus=text)
    pieces = list(_pieces(text))
    if len(pieces) == 1:
        return _one(pieces[0], alone=True)
    sources = [_one(piece, alone=True) for piece in pieces]
    if apart := [one.text for one in sources if not one.files]:
        raise BadText(
            f"{text!r} names {apart[0]} beside others; only files make one corpus. Give each its "
            f"share, as in '{':0.5,'.join(one.text for one in sources)}:0.5'."
        )
    return Source(text, files=tuple(file for one in sources for file in one.files))


def read_shares(text: str) -> tuple[Share, ...]:
    """The parts of a mixture, their shares adding up to 1; none where no share is written.

    Raises BadText for a share that is none, and where only some have one.
    """
    if text in CORPORA or _is_there(text):
        return ()
    pieces = list(_pieces(text))
    parts = [None if _is_there(piece) else _SHARE.fullmatch(piece) for piece in pieces]
    if not any(parts):
        return ()
    shares: list[tuple[str, float]] = []
    for piece, part in zip(pieces, parts, strict=True):
        if part is None:
            raise BadText(
                f"In the mixture {text!r} {piece!r} has no share. Give every part one: "
                f"'{piece}:0.5'."
            )
        shares.append((part["text"], _share(part["share"], text)))
    total = sum(share for _, share in shares)
    if not math.isfinite(total):
        raise BadText(f"The shares of the mixture {text!r} have no sum. Use such as 0.5 or 50%.")
    return tuple(Share(_one(name, alone=False), share / total) for name, share in shares)


def _share(written: str, text: str) -> float:
    value = float(written.removesuffix("%"))
    if not (math.isfinite(value) and value > 0):
        raise BadText(
            f"In the mixture {text!r} {written!r} is no share; a number above 0 was wanted, such "
            "as 0.5. Leave a part out that nothing is to be taken of."
        )
    return value


def _pieces(text: str) -> Iterator[str]:
    """What stands between commas; a comma in a name that is there, with a share or not, is none.

    Raises BadText where both readings are there.
    """
    parts = text.split(",")
    start = 0
    while start < len(parts):
        stop = len(parts)
        while stop > start + 1 and not _is_there(_name(",".join(parts[start:stop]))):
            stop -= 1
        whole = ",".join(parts[start:stop])
        if stop > start + 1 and all(_is_there(_name(part)) for part in parts[start:stop]):
            raise BadText(
                f"{whole!r} is a file, and so is each of its parts. Name the one file by a glob, "
                f"{whole.replace(',', '?')!r}, or move it."
            )
        yield whole if _is_there(_name(whole)) else whole.strip()
        start = stop


def _name(piece: str) -> str:
    """A piece without its share, where it has one."""
    part = None if _is_there(piece) else _SHARE.fullmatch(piece)
    return part["text"] if part else piece


def _is_there(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


def _one(text: str, *, alone: bool) -> Source:
    """What one name stands for; `alone`, outside a mixture, only files of `SUFFIXES` are text."""
    if text in CORPORA:
        return Source(text, corpus=text)
    if _is_there(text):
        return Source(text, files=tuple((file, None) for file in _files(Path(text), alone)))
    parts = _QUALIFIED.fullmatch(text)
    if parts is None:
        raise UnknownName("corpus", text, CORPORA)
    path, subset, split, column = parts["path"], parts["subset"], parts["split"], parts["column"]
    if _is_there(path):
        if subset is None and split is None:
            return Source(text, files=tuple((file, column) for file in _files(Path(path), alone)))
        if not Path(path).is_dir():
            raise BadText(f"{path} is a file; a subset or split is for data sets and folders.")
        return Source(text, data_set=DataSet(path, subset, split), column=column)
    if files := _matches(text):
        return Source(text, files=tuple((file, None) for file in files))
    if split is None and (files := _matches(path if subset is None else f"{path}[{subset}]")):
        return Source(text, files=tuple((file, column) for file in files))
    qualified = "/" in path or (subset, split, column) != (None, None, None)
    if qualified and _ON_HUB.fullmatch(path) and not path.endswith(SUFFIXES):
        return Source(text, data_set=DataSet(path, subset, split), column=column)
    raise _unknown(text)


def _unknown(text: str) -> BadText | UnknownName:
    """Why a name stands for nothing."""
    if glob.has_magic(text):
        return BadText(f"No file matches {text!r}. Look at the folder, and whether ** is wanted.")
    file = Path(text)
    if file.name.endswith(SUFFIXES):
        return BadText(f"There is no text file {file}.")
    if not (file.suffix or len(file.parts) > 1):
        return UnknownName("corpus", text, CORPORA)
    return BadText(f"{file} is no text file that can be read; {', '.join(SUFFIXES)} can.")


def _matches(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        return []
    try:
        return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if _is_file(name)]
    except (re.error, ValueError):
        return []


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _files(path: Path, alone: bool) -> Sequence[Path]:
    """A file, or the text files below a folder, sorted by name."""
    if path.is_file():
        if alone and not path.name.endswith(SUFFIXES):
            raise BadText(f"{path} is no text file that can be read; {', '.join(SUFFIXES)} can.")
        return [path]
    if not path.is_dir():
        raise BadText(f"{path} is no file that can be read, nor a folder.")
    try:
        below = [file for file in sorted(_below(path)) if file.is_file()]
    except OSError as error:
        raise BadText(f"{path} cannot be searched for text: {in_one_line(error)}.") from error
    if files := [file for file in below if file.name.endswith(SUFFIXES)]:
        return files
    endings = sorted({file.suffix for file in below if file.suffix})[:5]
    way = (
        f"its files end in {', '.join(endings)}. Take some by a glob: '{path}/**/*{endings[0]}'."
        if endings
        else f"Put some there: {', '.join(SUFFIXES)}."
    )
    raise BadText(f"{path} holds no text file{';' if endings else '.'} {way}")


def _below(folder: Path) -> list[Path]:
    """What lies below a folder and is not hidden. Raises OSError, BadText for too much of it."""

    def unlisted(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise BadText(
                f"{folder} holds more than {MOST_FILES:,} files. Name the folder that the text is "
                "in, or the files."
            )
    return found
