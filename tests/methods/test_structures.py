"""Structures: text that round-trips, counts that are aligned, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import BadPattern
from secateur.methods.pattern_text import parse, parse_pattern
from secateur.methods.structures import Budget, Depth, Several, Units, default_alignment, parts


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("25% of channels", Units(0.25, "channels")),
        ("50% of heads", Units(0.5, "heads")),
        ("12.5% of experts", Units(0.125, "experts")),
        ("1 block", Depth(count=1)),
        ("4 blocks", Depth(count=4)),
        ("12% of blocks", Depth(ratio=0.12)),
        ("to 75% of parameters", Budget(share=0.75)),
        ("to 6GB", Budget(bytes=6 * 10**9)),
        ("to 700MiB", Budget(bytes=700 * 2**20)),
        ("to 3.5TB", Budget(bytes=3_500_000_000_000)),
        ("to 4.5MB", Budget(bytes=4_500_000)),
        ("to 123456789B", Budget(bytes=123_456_789)),
        ("2 blocks + 20% of channels", Several((Depth(count=2), Units(0.2, "channels")))),
    ],
)
def test_text_round_trips(text, structure):
    assert parse(text) == structure
    assert str(structure) == text
    assert structure.kind == "structured"


@pytest.mark.parametrize(
    "text",
    [
        "0% of channels",
        "100% of heads",
        "-5% of experts",
        "0% of blocks",
        "20% of channels + 30% of channels",
        "to 0% of parameters",
        "to 120% of parameters",
    ],
)
def test_the_impossible_is_refused(text):
    with pytest.raises(BadPattern):
        parse(text)


@pytest.mark.parametrize("text", ["25% of chanels", "blocks", "4 layers", "25% of channels +", "x blocks"])
def test_what_names_nothing_is_refused_with_what_would(text):
    with pytest.raises(BadPattern, match="25% of channels"):
        parse(text)


def test_a_plan_wants_zeros():
    with pytest.raises(BadPattern, match="takes out whole structures"):
        parse_pattern("25% of channels")


@given(st.integers(2, 20000), st.floats(0.01, 0.99), st.sampled_from([None, 1, 8, 128]))
def test_what_stays_is_the_nearest_multiple(total, ratio, align):
    step = align or default_alignment(total)
    try:
        kept = Units(ratio, "channels").kept(total, align, "it")
    except BadPattern:
        assert round(total * (1 - ratio) / step) in (0, *range(-(-total // step), total + 1))
        return
    assert 0 < kept < total
    assert kept % step == 0
    assert abs(kept - total * (1 - ratio)) <= step / 2 + 1e-6


@pytest.mark.parametrize(
    ("total", "align"), [(11008, 128), (14336, 128), (512, 16), (172, 4), (128, 4), (5, 1), (1000, 8)]
)
def test_alignment_by_width(total, align):
    assert default_alignment(total) == align


def test_heads_and_experts_are_not_aligned():
    assert Units(0.25, "heads").kept(8, 128, "it") == 6
    assert Units(0.25, "experts").kept(60, None, "it") == 45


@pytest.mark.parametrize(
    ("structure", "total", "words"),
    [
        (Units(0.25, "heads"), 2, "One step is 50%, the most that can go 50%"),
        (Units(0.75, "heads"), 2, None),
        (Units(0.9, "heads"), 4, "nothing of them would be left"),
        (Units(0.001, "channels"), 512, "steps of 16"),
    ],
)
def test_counts_that_cannot_be_say_which_can(structure, total, words):
    if words is None:
        assert structure.kept(4, None, "it") == 1
        return
    with pytest.raises(BadPattern, match=words):
        structure.kept(total, None, "it")


def test_blocks_are_counted():
    assert Depth(ratio=0.12).removed(32) == 4
    assert Depth(count=3).removed(4) == 3
    for depth in (Depth(count=4), Depth(ratio=0.01), Depth(count=0)):
        with pytest.raises(BadPattern, match="From 1 to 3"):
            depth.removed(4)


@pytest.mark.parametrize("text", ["25 % of channels", " 25% of channel ", "25%  of channels"[:3] + " of channels"])
def test_small_slips_are_read(text):
    assert parse(text) == Units(0.25, "channels")


def test_parts():
    assert parts(parse("2 blocks + 20% of heads")) == (Depth(count=2), Units(0.2, "heads"))  # type: ignore[arg-type]
    assert parts(Units(0.2, "heads")) == (Units(0.2, "heads"),)
