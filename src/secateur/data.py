"""Text to tokens: windows `[samples, length]` with a fingerprint, from a corpus name or from files.

Corpora: `demo` (the standard library's text), `wikitext2` and `c4` (through `datasets`, or from a local copy
under a data folder: `DIR/wikitext2/test.jsonl`, `DIR/c4/*.jsonl`, …), and files (.txt, .jsonl, .json.gz,
.parquet; rows have a `text` field; several are separated by commas).

c4 and wikitext2 are sampled as the SparseGPT and Wanda code does (random documents longer than the window,
one random window each; random windows of the joined text). Other corpora are cut into windows that do not
overlap, at a random shift, and a random choice of them is taken. Their documents keep the borders that the
tokenizer puts in by itself; where it puts in none, its end-of-text token follows each document.

Perplexity is measured on the evaluation split cut into windows that do not overlap, the remainder dropped;
WikiText-2 is joined with two line feeds first, as the papers do.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateur import demo
from secateur.errors import BadCheckpoint, NotEnoughText, SecateurError, UnknownName

CORPORA = ("demo", "c4", "wikitext2")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


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
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"{folder} has no tokenizer that transformers can load: {first}") from error


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
        raise NotEnoughText(f"Calibration needs at least 1 sample of 2 tokens; found {samples} of {length}.")
    draw = random.Random(seed)
    if source == "c4":
        ids = _windows_of_documents(tokenizer, _texts("c4", "train", data_dir), samples, length, draw)
        return Windows(ids, source, "train", seed, None)
    split = "calibration" if source == "demo" else "train"
    stream = _encoded(tokenizer, source, split, data_dir)
    if len(stream) < samples * length:
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {samples * length:,} tokens; {source} ({split}) has "
            f"{len(stream):,}. Use --samples {len(stream) // length} or a smaller --seq-len."
        )
    if source == "wikitext2":
        starts = [draw.randint(0, len(stream) - length - 1) for _ in range(samples)]
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
    """All windows of `length` tokens of the evaluation split, or the first `windows`. Raises NotEnoughText."""
    split = {"demo": "evaluation", "c4": "validation"}.get(source, "test")
    stream = _encoded(tokenizer, source, split, data_dir)
    count = len(stream) // length
    if count < max(windows or 0, 2):
        raise NotEnoughText(
            f"{windows or 2} evaluation windows of {length} tokens were wanted; {source} ({split}) has "
            f"{len(stream):,} tokens, {count} windows. Use a smaller --windows or --seq-len."
        )
    ids = stream[: count * length].view(count, length)[:windows]
    return Windows(ids.contiguous(), source, split, None, len(stream))


def _encoded(tokenizer: PreTrainedTokenizerBase, source: str, split: str, data_dir: Path | None) -> Tensor:
    """A corpus as one stream of token ids, int64."""
    texts = _texts(source, split, data_dir)
    if source == "wikitext2":
        return torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
    documents: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]  # type: ignore[assignment]
    marked = tokenizer.num_special_tokens_to_add() > 0
    border = [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.asarray([*document, *border], dtype=np.int64) for document in documents]
    return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.int64)


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], samples: int, length: int, draw: random.Random
) -> Tensor:
    """One random window from each of `samples` random documents that are longer than the window."""
    windows: list[Tensor] = []
    lengths: dict[int, int] = {}
    while len(windows) < samples:
        if len(lengths) == len(texts) or len(lengths) > 2000 + 500 * samples:
            long_enough = [n for n in lengths.values() if n > length]
            if len(long_enough) == 0 or sum(long_enough) < samples * length:
                break
        number = draw.randint(0, len(texts) - 1)
        if lengths.get(number, length + 1) <= length:
            continue
        ids = tokenizer(texts[number], verbose=False)["input_ids"]
        lengths[number] = len(ids)  # type: ignore[arg-type]
        if len(ids) > length:  # type: ignore[arg-type]
            start = draw.randint(0, len(ids) - length - 1)  # type: ignore[arg-type]
            windows.append(torch.tensor(ids[start : start + length]))  # type: ignore[index]
    distinct = sum(n for n in lengths.values() if n > length)
    if len(windows) < samples or distinct < samples * length:
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {samples * length:,} tokens from documents longer than "
            f"{length}; the {len(lengths):,} documents looked at have {distinct:,} in "
            f"{sum(n > length for n in lengths.values())} such documents. Use fewer --samples or a smaller --seq-len."
        )
    return torch.stack(windows)


def _texts(source: str, split: str, data_dir: Path | None) -> Sequence[str]:
    """The documents of a corpus, or of files. Raises UnknownName where `source` is neither."""
    if source == "demo":
        return demo.documents(split)
    if source in CORPORA:
        if data_dir is None:
            return _from_hub(source, split)
        files = list(_local_files(data_dir / source, split))
        if not files:
            raise NotEnoughText(
                f"{data_dir / source} holds no {split} split ({split}.jsonl, .json.gz, .parquet or .txt). "
                "Put it there, or leave --data-dir out to fetch the corpus."
            )
        return _from_files(files)
    files = [Path(part) for part in source.split(",")]
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise UnknownName("corpus", source, CORPORA)
        if not file.is_file():
            raise NotEnoughText(f"There is no text file {file}.")
    return _from_files(files)


def _local_files(folder: Path, split: str) -> Iterator[Path]:
    """The files of a split; all files where the names tell no split apart."""
    files = [file for file in sorted(folder.glob("*")) if file.name.endswith(SUFFIXES)]
    named = [file for file in files if any(word in file.name for word in ("train", "validation", "test"))]
    yield from [file for file in named if split in file.name] if named else files


def _from_files(files: list[Path]) -> Sequence[str]:
    from datasets import DatasetDict, load_dataset  # pyarrow takes seconds to import
    from datasets.exceptions import DatasetGenerationError

    texts: list[str] = []
    for file in files:
        if file.name.endswith(".txt"):
            texts.append(file.read_text(encoding="utf-8"))
            continue
        reader = "parquet" if file.name.endswith(".parquet") else "json"
        try:
            rows = load_dataset(reader, data_files=str(file), split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise NotEnoughText(f"{file} cannot be read as {reader}: {error}") from error
        if isinstance(rows, DatasetDict) or "text" not in (rows.column_names or ()):
            raise NotEnoughText(f"{file} has no 'text' field; found {', '.join(rows.column_names or ['nothing'])}.")
        texts += rows["text"]
    return texts


def _from_hub(source: str, split: str) -> Sequence[str]:
    from datasets import load_dataset

    try:
        if source == "wikitext2":
            return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
        part = {"train": "train.00000-of-01024", "validation": "validation.00000-of-00008"}[split]
        return load_dataset("allenai/c4", data_files=f"en/c4-{part}.json.gz", split="train")["text"]
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SecateurError(
            f"{source} could not be fetched ({first}). Give a local copy with --data-dir, or use 'demo' or files."
        ) from error
