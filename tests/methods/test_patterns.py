"""Patterns: exact counts, ties by position, text that round-trips, messages that help."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import masks

from secateur.errors import BadPattern
from secateur.methods.pattern_text import parse
from secateur.methods.patterns import NM, Unstructured
from secateur.system.tensors import count_zeros

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


def _columns_in_order(draw):
    return torch.arange(512.0).expand(320, 512) + torch.rand(320, 512, generator=draw)  # a sample sees few columns


@pytest.mark.parametrize("ratio", [1e-5, 0.003, 0.5, 0.7, 0.99999])
@pytest.mark.parametrize(
    "scores",
    [
        lambda draw: torch.randn(320, 512, generator=draw).abs(),
        lambda draw: torch.randint(5, (320, 512), generator=draw).float(),
        lambda draw: torch.zeros(320, 512),
        _columns_in_order,
        lambda draw: torch.arange(320.0 * 512).view(320, 512).flip(0),
        lambda draw: torch.where(torch.rand(320, 512, generator=draw) < 0.5, 0.0, torch.inf),
    ],
    ids=["normal", "five values", "zeros", "columns in order", "descending", "infinite"],
)
def test_a_large_matrix_loses_its_lowest_exactly(scores, ratio):
    """Large enough for the threshold to be looked for in a sample."""
    values = scores(torch.Generator().manual_seed(0))
    count = round(ratio * values.numel())
    expected = torch.ones(values.numel(), dtype=torch.bool)
    expected[values.flatten().sort(stable=True).indices[:count]] = False
    assert torch.equal(Unstructured(ratio, "matrix").mask(values), expected.view_as(values))


def test_a_threshold_that_the_sample_misses_is_still_exact():
    """Every sampled score is high, the others low."""
    values = torch.rand(320, 512, generator=torch.Generator().manual_seed(0))
    values.view(-1)[:: 320 * 512 // 2**15 | 1] += 2
    kept = Unstructured(0.5, "matrix").mask(values)
    assert (~kept).sum() == 320 * 256
    assert values[~kept].max() < values[kept].min()


@pytest.mark.parametrize("nm", [(1, 200), (150, 200)])
def test_groups_of_hundreds_are_counted(nm):
    """More than an int8 can hold."""
    scores = torch.randint(50, (3, 400), generator=torch.Generator().manual_seed(0)).float()
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


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64", "uint16", "int8", "float8_e4m3fn"])
def test_zeros_are_counted_in_every_dtype(name):
    dtype = getattr(torch, name)
    numbers = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]]).to(dtype)
    assert count_zeros(numbers) == count_zeros(numbers.T) == 3
    if dtype == torch.float32:
        assert count_zeros(torch.tensor([0.0, -0.0, float("nan"), 1e-45])) == 2
