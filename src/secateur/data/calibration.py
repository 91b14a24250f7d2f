"""Calibration text: token windows `[samples, length]`, drawn by a seed.

c4 and wikitext2 are sampled as the SparseGPT and Wanda code does (random documents longer than the
window, one random window each; random windows of the joined text), but that no document of c4 comes
twice before all that are long enough came. Other corpora are cut into windows that do not overlap,
at a random shift, and a random choice of them is taken. The last eighth shares no text with others,
if there is so much: it judges what was tuned on the windows before (models/stream/steps.py).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.data.corpora import corpus_of, corpus_texts
from secateur.data.id_stream import HELD
from secateur.data.long_text import Document
from secateur.data.overlap import sharing
from secateur.data.readers import LARGE, is_packed, kind_of
from secateur.data.sampling import BYTES_A_TOKEN, Sampling, sampled
from secateur.data.sources import Share, Source, read_shares, read_source
from secateur.data.tokenizer import encode
from secateur.data.windows import Part, Windows, border_of, encoded
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
    how = samples, length, seed
    if shares := read_shares(source):
        drawn = _mixed(tokenizer, source, shares, how, data_dir)
    else:
        drawn = _drawn(tokenizer, read_source(source), how, data_dir)
    shared = sharing(drawn.ids)
    last = [number for number in range(samples) if number not in shared][-max(1, samples // 8) :]
    order = sorted(range(samples), key=set(last).__contains__)
    return replace(drawn, ids=drawn.ids[order])


Draw = tuple[int, int, int]
"""How many windows, of how many tokens, by which seed."""


def _drawn(
    tokenizer: PreTrainedTokenizerBase, source: Source, how: Draw, data_dir: Path | None
) -> Windows:
    """Windows of one corpus."""
    samples, length, seed = how
    draw = random.Random(seed)
    split = "calibration" if source.corpus == "demo" else "train"
    corpus = corpus_of(source, split, data_dir, seed)
    if source.corpus == "c4":
        ids = _windows_of_documents(tokenizer, corpus_texts(corpus), samples, length, draw)
        return Windows(ids, source.text, corpus.split, seed, None)
    if corpus.is_large(samples * length):
        sampling = Sampling(tokenizer, border_of, samples, length, draw)
        windows, drawn = sampled(sampling, corpus)
        if len(windows) == samples:
            return Windows(torch.stack(windows), source.text, corpus.split, seed, None, drawn)
        draw = random.Random(seed)
    stream = encoded(tokenizer, corpus)
    ids = _windows_of_stream(stream, source, corpus.split, (samples, length), draw)
    if corpus.more:
        return Windows(ids, source.text, corpus.split, seed, None, "from what came first")
    return Windows(ids, source.text, corpus.split, seed, len(stream))


def drawing_bytes(
    source: str, *, samples: int, length: int, data_dir: Path | None
) -> dict[str, int]:
    """What drawing windows holds of a corpus, at most, by name: text, and ids of its tokens.

    From the sizes of files alone. Raises BadText, UnknownName, NotEnoughText.
    """
    shares = read_shares(source) or [Share(read_source(source), 1.0)]
    counts = _windows_of_each(source, shares, samples)
    held = [
        _held(share.source, count * length, data_dir)
        for share, count in zip(shares, counts, strict=True)
    ]
    return max(held, key=lambda sizes: sum(sizes.values()))


def _held(source: Source, tokens: int, data_dir: Path | None) -> dict[str, int]:
    """What drawing `tokens` of one corpus holds; rows of the hub's corpora stay on disk."""
    if source.data_set is not None:
        return {"text": LARGE, "token ids": 4 * HELD}
    if source.corpus in ("c4", "wikitext2") and data_dir is None:
        return {}
    corpus = corpus_of(source, "calibration" if source.corpus == "demo" else "train", data_dir)
    whole = [file for file, _ in corpus.files if kind_of(file) == "text"]
    if corpus.is_large(tokens):
        groups = 2 * BYTES_A_TOKEN * tokens
        return {"text": max(groups, LARGE * any(map(is_packed, whole)))}
    size = corpus.text_bytes(max(LARGE, 32 * tokens)) + sum(len(str(one)) for one in corpus.texts)
    if source.corpus == "c4":
        return {"text": min(size, LARGE)}
    largest = max((file.stat().st_size for file in whole), default=0)
    return {"text": min(largest, LARGE), "token ids": 4 * min(size, HELD)}


def _windows_of_stream(
    stream: Tensor, source: Source, split: str, size: tuple[int, int], draw: random.Random
) -> Tensor:
    """Random windows of all tokens of a corpus. Raises NotEnoughText."""
    samples, length = size
    if len(stream) < samples * length:
        most = len(stream) // length
        fewer = f"Use {f'--samples {most}' if most else 'more text'} or a smaller --seq-len."
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {samples * length:,} tokens; {source.text} "
            f"({split}) has {len(stream):,}. {fewer}"
        )
    if source.corpus == "wikitext2":
        starts = [draw.randint(0, max(len(stream) - length - 1, 0)) for _ in range(samples)]
    else:
        spare = len(stream) - samples * length
        shift = draw.randint(0, min(spare, length - 1))
        tiles = (len(stream) - shift) // length
        starts = [shift + length * tile for tile in draw.sample(range(tiles), samples)]
    return torch.stack([stream[start : start + length] for start in starts]).to(torch.int64)


def _mixed(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    shares: Sequence[Share],
    how: Draw,
    data_dir: Path | None,
) -> Windows:
    """Windows of several texts, each of one alone, in an order by the seed."""
    samples, length, seed = how
    counts = _windows_of_each(source, shares, samples)
    parts = [
        _drawn(tokenizer, share.source, (count, length, seed), data_dir)
        for share, count in zip(shares, counts, strict=True)
    ]
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    table = tuple(
        Part(
            one.source,
            one.split,
            round(share.share, 6),
            count,
            count * length,
            one.available_tokens,
            one.drawn,
        )
        for one, share, count in zip(parts, shares, counts, strict=True)
    )
    ids = torch.cat([one.ids for one in parts])[order]
    return Windows(ids, source, "mixture", seed, None, None, table)


def _windows_of_each(source: str, shares: Sequence[Share], samples: int) -> list[int]:
    """How many windows of a mixture are of each text. Raises NotEnoughText where that is none."""
    counts = apportioned([share.share for share in shares], samples)
    if 0 in counts:
        part = shares[counts.index(0)]
        raise NotEnoughText(
            f"Of {samples} samples the mixture {source!r} leaves none for {part.source.text}, "
            f"whose share is {part.share:.2%}. Use more --samples, or leave that part out."
        )
    return counts


def apportioned(shares: Sequence[float], count: int) -> list[int]:
    """How many of `count` fall to each share, which add up to 1: by the largest remainders."""
    quotas = [share * count for share in shares]
    whole = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda part: whole[part] - quotas[part])
    for part in order[: count - sum(whole)]:
        whole[part] += 1
    return whole


def _windows_of_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Document],
    samples: int,
    length: int,
    draw: random.Random,
) -> Tensor:
    """One random window from each of `samples` random documents that are longer than the window;
    several from one where there are fewer.
    """
    windows: list[Tensor] = []
    lengths: dict[int, int] = {}  # of documents that were looked at
    long, taken = (
        set[int](),
        set[int](),
    )  # those that are long enough; taken, since all of them were
    distinct, wanted = 0, samples * length
    most = min(len(texts), 2000 + 500 * samples)  # documents that are looked at

    def look(number: int) -> list[int]:
        nonlocal distinct
        ids = encode(tokenizer, [texts[number]])[0]
        if number not in lengths and len(ids) > length:
            long.add(number)
            distinct += len(ids)
        lengths[number] = len(ids)
        return ids

    while len(windows) < samples and (len(lengths) < most or distinct >= wanted):
        number = draw.randint(0, len(texts) - 1)
        if number in taken and len(lengths) >= most and len(taken) == len(long):
            taken.clear()
        if number in taken or lengths.get(number, length + 1) <= length:
            continue
        if len(ids := look(number)) > length:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(torch.tensor(ids[start : start + length]))
            taken.add(number)
    for number in range(len(texts)):  # repeated draws may have left out long documents
        if distinct >= wanted or len(lengths) >= most:
            break
        if number not in lengths:
            look(number)
    if len(windows) < samples or distinct < wanted:
        raise NotEnoughText(
            f"{samples} samples of {length} tokens need {wanted:,} tokens from documents longer "
            f"than {length}; the {len(lengths):,} documents looked at have {distinct:,} in "
            f"{len(long)} such documents. Use fewer --samples or a smaller --seq-len."
        )
    return torch.stack(windows)
