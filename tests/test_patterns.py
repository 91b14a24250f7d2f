"""Patterns: exact counts, ties by position, text that round-trips, messages that help."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import masks

from secateur.errors import BadPattern
from secateur.patterns import NM, Unstructured, parse

# Few distinct values, so that ties are the rule.
tied_scores = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 5).flatmap(
        lambda groups: st.lists(
            st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8 * groups, max_size=8 * groups),
            min_size=rows,
            max_size=rows,
        ).map(torch.tensor)
    )
)
ratios = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.99]), st.floats(0, 0.999))


@given(tied_scores, ratios, st.sampled_from(["row", "matrix"]))
def test_unstructured_mask_equals_the_sorted_reference(scores, ratio, over):
    kept = Unstructured(ratio, over).mask(scores)
    assert kept.tolist() == masks.unstructured(scores.numpy(), ratio, over).tolist()


@given(tied_scores, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8)]))
def test_n_of_m_mask_equals_the_sorted_reference(scores, nm):
    assert NM(*nm).mask(scores).tolist() == masks.n_of_m(scores.numpy(), *nm).tolist()


@given(ratios, st.integers(1, 7), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_column_blocks_add_up_to_the_exact_count(ratio, rows, widths):
    for pattern, groups in ((Unstructured(ratio, "matrix"), 1), (Unstructured(ratio, "row"), rows)):
        removed = start = 0
        for width in widths:
            part = pattern.columns(rows, start, start + width)
            removed += (~part.mask(torch.rand(rows, width))).sum().item()
            start += width
        assert removed == groups * round(ratio * (rows * start // groups))


def test_weights_that_are_all_equal_lose_exactly_the_share_asked():
    """The reference code removes everything at or below its threshold: 60 % of tied weights for 50 %."""
    kept = Unstructured(0.5, "matrix").mask(torch.ones(10, 10))
    assert (~kept).sum() == 50
    assert not kept[:5].any()
    assert Unstructured(0.0, "matrix").mask(torch.ones(10, 10)).all()


@pytest.mark.parametrize("text", ["50%", "12.5% of row", "33% of matrix", "0%", "2:4", "1:32", "66.6666%"])
def test_text_round_trips(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100%", "Sparsity is the share removed, at least 0% and under 100%; found 100%."),
        ("-5%", "Sparsity is the share removed, at least 0% and under 100%; found -5%."),
        ("4:4", "N:M keeps N of every M inputs, 0 < N < M; found 4:4."),
        ("0:4", "N:M keeps N of every M inputs, 0 < N < M; found 0:4."),
        ("half", "'half' is no sparsity pattern."),
        ("0.5", "'0.5' is no sparsity pattern."),
        ("nan%", "'nan%' is no sparsity pattern."),
        ("2:4:8", "'2:4:8' is no sparsity pattern."),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(BadPattern) as error:
        parse(text)
    assert str(error.value).startswith(message)


def test_a_site_that_cannot_hold_the_pattern_is_named():
    with pytest.raises(BadPattern) as error:
        NM(2, 4).check((4096, 11006), "layers.0.mlp.down_proj")
    assert str(error.value) == (
        "2:4 needs inputs in groups of 4; layers.0.mlp.down_proj has 11006. "
        "Leave it out with --skip '*down_proj' or use '50%'."
    )
