"""Marks of a text: enough of it, kept on disk, to find out whether another text has a part of it."""

import json
import random
from base64 import b64decode, b64encode
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch
from support.texts import byte_tokenizer

from secateur.data.calibration import calibration_windows
from secateur.data.overlap import MARKS, MOST_MARKS, Marks, run_length, sharing
from secateur.system.typed import read_as

STREAM = torch.tensor(random.Random(0).choices(range(50_000), k=40_000))


def windows_of(start: int, count: int, length: int = 256) -> torch.Tensor:
    return STREAM[start : start + count * length].view(count, length)


def shared(windows: torch.Tensor, other: torch.Tensor, run: int = 32) -> int:
    """How many windows have a run of tokens of the other's: all of them, in a set."""
    known = {tuple(row[at : at + run]) for row in other.tolist() for at in range(len(row) - run + 1)}
    rows = windows.tolist()
    return sum(any(tuple(row[at : at + run]) in known for at in range(len(row) - run + 1)) for row in rows)


def test_a_text_that_has_a_part_of_another_is_found_and_no_other():
    calibrated = windows_of(1000, 20)
    marks = Marks.of(calibrated)
    assert (marks.run, len(b64decode(marks.hashes))) == (32, 20 * MARKS * 8)
    for start in range(0, 8000, 100):
        judged = windows_of(start, 3)
        met, all_of_them = marks.met(judged), shared(judged, calibrated)
        assert met <= all_of_them
    for start in range(0, 5000, 37):  # a quarter of a window and a run, which lie in one window
        stretch = STREAM[1000 + start : 1000 + start + 256 // MARKS + 31]
        if start // 256 == (start + len(stretch) - 1) // 256:
            assert marks.met(stretch.view(1, -1)) == 1
    assert marks.met(windows_of(20_000, 40)) == 0
    assert marks.met(windows_of(1000, 20)) == 20


def test_of_many_windows_fewer_marks_are_kept():
    many = torch.arange(3 * MOST_MARKS * 32).view(3 * MOST_MARKS, 32)
    marks = Marks.of(many)
    assert marks.met(many[:50]) == 50
    assert len(b64decode(marks.hashes)) == 3 * MOST_MARKS * 8


@pytest.mark.parametrize("length", [4, 8, 20, 33])
def test_short_windows(length):
    marks = Marks.of(windows_of(0, 5, length))
    assert marks.run == max(min(length, 32), 8)
    assert marks.met(windows_of(0, 5, length)) == (5 if length >= 8 else 0)
    assert marks.met(windows_of(0, 1, 4)) == 0


def test_marks_on_disk_mean_the_same_for_good():
    """Results of today are asked about by the package of tomorrow."""
    marks = Marks.of(torch.arange(32).view(1, 32))
    hashed = 0
    for token in range(32):
        hashed = (hashed * 0x9E3779B97F4A7C15 + token + 1) % 2**64
    assert marks.model_dump() == {"run": 32, "hashes": b64encode(hashed.to_bytes(8, "little")).decode()}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ({"run": 0, "hashes": ""}, "greater than or equal to 8"),
        ({"run": 32}, "lacks field 'hashes'"),
        ({"run": 32, "hashes": "AAAA"}, "hashes of eight bytes each were wanted"),
        ({"run": 32, "hashes": "é!"}, "only ASCII"),
        ({"run": 32, "hashes": "A"}, "base64"),
    ],
)
def test_marks_that_are_none(spoilt, words):
    with pytest.raises(ValueError, match=words):
        read_as(Marks, spoilt)


def test_windows_that_share_text_with_others_are_found():
    """Against every pair, run by run."""
    windows = torch.randint(0, 1000, (9, 200), generator=torch.Generator().manual_seed(0))
    windows[4, 30:120] = windows[1, 100:190]  # 90 tokens, at no whole number of runs apart
    windows[7, :31] = windows[2, :31]  # less than a run
    windows[8] = windows[0]
    size = run_length(200, [])
    assert sharing(windows) == {0, 1, 4, 8}
    runs = [{tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)} for ids in windows.tolist()]
    assert {i for i, j in permutations(range(9), 2) if runs[i] & runs[j]} == {0, 1, 4, 8}
    assert sharing(windows[2:4, :5]) == set()


@pytest.mark.parametrize(("documents", "long"), [(40, 24), (12, 12), (60, 5)])
def test_no_document_of_c4_comes_twice_before_all_came(documents, long, tmp_path):
    """The papers' code draws with replacement: of a small copy windows that judge would be tuned on."""
    (tmp_path / "c4").mkdir()
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=400 if n < long else 20)) for n in range(documents)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "c4" / "train.jsonl").write_text(rows)
    tokenizer: Any = byte_tokenizer()
    windows = calibration_windows(tokenizer, "c4", samples=20, length=64, seed=0, data_dir=tmp_path).ids
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in windows]
    owners = [next(n for n, text in enumerate(texts) if one in text) for one in said]
    often = Counter(owners)
    assert {often[n] for n in range(long)} <= {20 // long, -(-20 // long)}
    assert not sharing(windows) & {18, 19}  # the last eighth
