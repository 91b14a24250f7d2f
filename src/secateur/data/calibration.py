"""Calibration text: token windows `[samples, length]`, drawn by a seed.

c4 and wikitext2 are sampled as the SparseGPT and Wanda code does (random documents longer than the
window, one random window each; random windows of the joined text). Other corpora are cut into
windows that do not overlap, at a random shift, and a random choice of them is taken.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat
from secateur.data.corpora import corpus_texts
from secateur.data.tokenizer import encode
from secateur.data.windows import Windows, encoded
from secateur.errors import NotEnoughText


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
        raise NotEnoughText(
            f"Calibration needs at least 1 sample of 2 tokens; found {samples} of {length}."
        )
    draw = random.Random(seed)
    if source == "c4":
        ids = _windows_of_documents(
            tokenizer, corpus_texts("c4", "train", data_dir), samples, length, draw
        )
        return Windows(ids, source, "train", seed, None)
    split = "calibration" if source == "demo" else "train"
    stream = encoded(tokenizer, source, split, data_dir)
    if len(stream) < samples * length:
        most = len(stream) // length
        fewer = f"Use {f'--samples {most}' if most else 'more text'} or a smaller --seq-len."
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {samples * length:,} tokens; {source} "
            f"({split}) has {len(stream):,}. {fewer}"
        )
    if source == "wikitext2":
        starts = [draw.randint(0, max(len(stream) - length - 1, 0)) for _ in range(samples)]
    else:
        spare = len(stream) - samples * length
        shift = draw.randint(0, min(spare, length - 1))
        tiles = (len(stream) - shift) // length
        starts = [shift + length * tile for tile in draw.sample(range(tiles), samples)]
    ids = torch.stack([stream[start : start + length] for start in starts])
    return Windows(ids, source, split, seed, len(stream))


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Chat],
    samples: int,
    length: int,
    draw: random.Random,
) -> Tensor:
    """One random window from each of `samples` random documents that are longer than the window."""
    windows: list[Tensor] = []
    lengths: dict[int, int] = {}
    wanted, most = samples * length, 2000 + 500 * samples  # tokens; documents that are looked at

    def long_enough() -> list[int]:
        return [tokens for tokens in lengths.values() if tokens > length]

    while len(windows) < samples:
        looked = len(lengths) == len(texts) or len(lengths) > most
        if looked and (not long_enough() or sum(long_enough()) < wanted):
            break
        number = draw.randint(0, len(texts) - 1)
        if lengths.get(number, length + 1) <= length:
            continue
        ids = encode(tokenizer, [texts[number]])[0]
        lengths[number] = len(ids)
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(torch.tensor(ids[start : start + length]))
    distinct = sum(long_enough())
    for number in range(len(texts)):  # repeated draws may have left out long documents
        if distinct >= wanted or len(lengths) > most:
            break
        if number not in lengths:
            lengths[number] = len(encode(tokenizer, [texts[number]])[0])
            distinct += lengths[number] if lengths[number] > length else 0
    if len(windows) < samples or distinct < wanted:
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {wanted:,} tokens from documents longer "
            f"than {length}; the {len(lengths):,} documents looked at have {distinct:,} in "
            f"{len(long_enough())} such documents. Use fewer --samples or a smaller --seq-len."
        )
    return torch.stack(windows)
