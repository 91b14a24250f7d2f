"""The documents of a corpus, by its name or from files, and the rows of a file."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secateur.data import demo
from secateur.data.chat import FIELDS, Chat, chat_of
from secateur.errors import BadText, NotEnoughText, SecateurError, UnknownName, in_one_line

CORPORA = ("demo", "c4", "wikitext2")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def corpus_texts(source: str, split: str, data_dir: Path | None) -> Sequence[str | Chat]:
    """The documents of a corpus, or of files. Raises UnknownName where `source` is neither."""
    if source == "demo":
        return demo.documents(split)
    if source in CORPORA:
        if data_dir is None:
            return _from_hub(source, split)
        files = list(_local_files(data_dir / source, split))
        if not files:
            raise NotEnoughText(
                f"{data_dir / source} holds no {split} split ({split}.jsonl, .json.gz, .parquet or "
                ".txt). Put it there, or leave --data-dir out to fetch the corpus."
            )
        return _from_files(files)
    files = [Path(part) for part in source.split(",")]
    for file in files:
        if not file.name.endswith(SUFFIXES):
            if not (file.exists() or file.suffix or len(file.parts) > 1):
                raise UnknownName("corpus", source, CORPORA)
            raise BadText(f"{file} is no text file that can be read; {', '.join(SUFFIXES)} can.")
        if not file.is_file():
            raise BadText(f"There is no text file {file}.")
    return _from_files(files)


def _local_files(folder: Path, split: str) -> Iterator[Path]:
    """The files of a split; all files where the names tell no split apart."""
    files = [file for file in sorted(folder.glob("*")) if file.name.endswith(SUFFIXES)]
    splits = ("train", "validation", "test")
    named = [file for file in files if any(word in file.name for word in splits)]
    yield from [file for file in named if split in file.name] if named else files


def _from_files(files: Sequence[Path]) -> list[str | Chat]:
    """The documents of files: the whole of a .txt, else the text or the conversation of each row.

    Raises BadText.
    """
    texts: list[str | Chat] = []
    for file in files:
        try:
            if file.name.endswith(".txt"):
                texts.append(file.read_text(encoding="utf-8"))
                continue
            for number, row in enumerate(rows(file, ("text", *FIELDS)), 1):
                texts.append(_document(row, f"row {number} of {file}"))
        except UnicodeDecodeError as error:
            raise BadText(
                f"{file} is not text in UTF-8 ({in_one_line(error)}). Convert it first."
            ) from error
        except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
            raise BadText(f"{file} cannot be read: {in_one_line(error)}.") from error
    return texts


def rows(file: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """The rows of a .parquet, of a JSON array, or of a file with one JSON value a line.

    .gz and .xz are unpacked. Of a .parquet `columns` are read, those that it has; none means all.
    Raises BadText for a line that is no JSON, else what the reader raises.
    """
    if file.name.endswith(".parquet"):
        from pyarrow import parquet  # takes long to import

        with parquet.ParquetFile(file) as table:
            names = [name for name in table.schema_arrow.names if name in columns or not columns]
            for batch in table.iter_batches(columns=names):
                yield from batch.to_pylist()
        return
    unpacked: Any = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    with unpacked(file, "rt", encoding="utf-8") as stream:
        array = stream.read(1) == "["
        stream.seek(0)
        if array:
            yield from json.load(stream)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = in_one_line(error)
                    raise BadText(f"Line {number} of {file} is no JSON: {reason}.") from error
                yield row


def _document(row: Any, where: str) -> str | Chat:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise BadText(f"Every row needs a field 'text' or 'messages'; {where} has none.")
    if "text" not in row:
        if chat := chat_of(row, where):
            return chat
        known = f"; it has {', '.join(map(repr, list(row)[:5]))}" if row else ""
        raise BadText(f"Every row needs a field 'text' or 'messages'; {where} has none{known}.")
    text = row["text"]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise BadText(f"The field 'text' must hold a string; in {where} it holds {kind}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"The text of {where} cannot be encoded: {in_one_line(error)}.") from error
    return text


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
