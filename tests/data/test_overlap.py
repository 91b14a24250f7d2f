"""Marks of a text: enough of it, kept on disk, to find out whether another text has a part of it."""

import random
from base64 import b64decode, b64encode

import pytest
import torch

from secateur.data.overlap import MARKS, MOST_MARKS, Marks
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
