"""The documents of a corpus: the demo's own text, c4 and wikitext2, files, a data set of the hub.

c4 and wikitext2 come through `datasets`, or from a local copy under a data folder
(`DIR/wikitext2/test.jsonl`, `DIR/c4/*.jsonl`, …).
"""

import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from secateur.data import demo
from secateur.data.long_text import Document
from secateur.data.readers import (
    LARGE,
    Raw,
    document_of,
    documents_of,
    is_packed,
    kind_of,
    opened,
    reading,
    table_bytes,
)
from secateur.data.sources import SUFFIXES, DataSet, Source, read_source
from secateur.errors import BadText, NotEnoughText, SecateurError, in_one_line

SHUFFLED = 1000
"""Rows of a data set that are held to take one at random."""
File = tuple[Path, str | None]


@dataclass(frozen=True)
class Corpus:
    """Text by its source and split: in `files`, or as `texts` that are there.

    `more`: whether a data set goes on after these texts.
    """

    source: Source
    split: str
    files: tuple[File, ...] = ()
    texts: Sequence[Document] = ()
    more: bool = False

    def documents(self) -> Iterator[Document]:
        """All documents, one after another. Raises BadText."""
        yield from self.texts
        for raw in self.raw():
            yield raw.parse()

    def raw(self) -> Iterator[Raw]:
        """All documents of the files, not parsed. Raises BadText."""
        for file, column in self.files:
            yield from documents_of(file, column)

    def is_large(self, tokens: int) -> bool:
        """Whether there is so much text that `tokens` are drawn without reading all of it.

        That is decided by the files alone, so that the draw is the same everywhere.
        """
        if self.more or self.source.corpus:
            return self.more
        most = max(LARGE, 32 * tokens)
        return self.text_bytes(most) > most

    def text_bytes(self, most: int) -> int:
        """The bytes of text in the files, counted until they are more than `most`."""
        size = 0
        for file, column in self.files:
            size += _text_bytes(file, column, most - size)
            if size > most:
                break
        return size


def corpus_of(
    source: Source | str, split: str | None, data_dir: Path | None, seed: int | None = None
) -> Corpus:
    """The corpus of a source. Raises UnknownName, BadText, NotEnoughText.

    `split` is what the corpora call it that have splits, for data sets unless they name one; a data
    set is shuffled by `seed`, None leaves it in order.
    """
    source = read_source(source) if isinstance(source, str) else source
    split = split or "train"
    if source.corpus == "demo":
        return Corpus(source, split, texts=demo.documents(split))
    if source.corpus and data_dir is None:
        return Corpus(source, split, texts=_from_hub(source.corpus, split))
    if source.corpus and data_dir is not None:
        files = list(_local_files(data_dir / source.corpus, split))
        if not files:
            raise NotEnoughText(
                f"{data_dir / source.corpus} holds no {split} split ({split}.jsonl, .json.gz, "
                ".parquet or .txt). Put it there, or leave --data-dir out to fetch the corpus."
            )
        return Corpus(source, split, tuple((file, None) for file in files))
    if source.data_set is not None:
        split = source.data_set.split or split
        texts, more = _first_texts(source, source.data_set, split, seed)
        return Corpus(source, split, texts=texts, more=more)
    return Corpus(source, split, source.files)


def corpus_texts(corpus: Corpus) -> Sequence[Document]:
    """The documents of a corpus by their number; many of them wait in a file. Raises BadText."""
    if not corpus.files:
        return corpus.texts
    few = corpus.text_bytes(LARGE) <= LARGE
    return list(corpus.documents()) if few else StoredTexts(corpus)


class StoredTexts(Sequence[Document]):
    """The documents of files by their number, in a temporary file."""

    def __init__(self, corpus: Corpus) -> None:
        import pickle  # of strings and conversations that we write and read ourselves

        self._pickle = pickle
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places = array("q", [0])
        for text in corpus.documents():
            self._file.write(pickle.dumps(text))
            self._places.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._places) - 1

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start = self._places[range(len(self))[index]]
        self._file.seek(start)
        return self._pickle.load(self._file)


def _text_bytes(file: Path, column: str | None, most: int) -> int:
    """The bytes of text in a file; counting what is packed ends soon after `most`."""
    with reading(file):
        if kind_of(file) == "parquet":
            return table_bytes(file, column)
        if not is_packed(file):
            return file.stat().st_size
        size = 0
        with opened(file) as stream:
            while size <= most and (data := stream.read(2**20)):
                size += len(data)
        return size


def _local_files(folder: Path, split: str) -> Iterator[Path]:
    """The files of a split; all files where the names tell no split apart."""
    files = [file for file in sorted(folder.glob("*")) if file.name.endswith(SUFFIXES)]
    splits = ("train", "validation", "test")
    named = [file for file in files if any(word in file.name for word in splits)]
    yield from [file for file in named if split in file.name] if named else files


def _from_hub(source: str, split: str) -> Sequence[str]:
    from datasets import load_dataset

    try:
        if source == "wikitext2":
            return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
        part = {"train": "train.00000-of-01024", "validation": "validation.00000-of-00008"}[split]
        return load_dataset("allenai/c4", data_files=f"en/c4-{part}.json.gz", split="train")["text"]
    except (OSError, ValueError, RuntimeError) as error:
        raise SecateurError(
            f"{source} could not be fetched ({in_one_line(error)}). "
            "Give a local copy with --data-dir, or use 'demo' or files."
        ) from error


def _first_texts(
    source: Source, name: DataSet, split: str, seed: int | None
) -> tuple[list[Document], bool]:
    """Documents of a data set, shuffled by `seed`, up to `LARGE`; and whether there are more."""
    texts: list[Document] = []
    size = 0
    for number, row in enumerate(_rows(source, name, split, seed), 1):
        if size > LARGE:
            return texts, True
        texts.append(document_of(row, f"row {number} of {source.text}", source.column))
        size += len(str(texts[-1]))
    return texts, False


def _rows(source: Source, name: DataSet, split: str, seed: int | None) -> Iterator[Any]:
    """The rows of a data set as they arrive. Raises BadText where they do not."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(name.path, name.subset, split=split, streaming=True)
        yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise BadText(
            f"{source.text} could not be read as a data set, split {split!r}: "
            f"{in_one_line(error)}. It is neither a file nor a folder here; a split is named as in "
            "owner/name[subset](split):column."
        ) from error
