"""Masks from the C library against the same in torch and against sorting, with NaN, infinities and both zeros."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import masks as reference
from torch import Tensor

from secateur.kernels import masks
from secateur.kernels.library import library
from secateur.kernels.masks import best_of_groups, best_of_groups_in_torch, without_lowest, without_lowest_in_torch

pytestmark = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")

NAN = float("nan")
FEW = [0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), -float("inf"), NAN, -NAN]
values = st.one_of(st.sampled_from(FEW), st.floats(width=32), st.floats(0, 4, width=32))


def scores_of(draw: st.DataObject, rows: int, columns: int, of: st.SearchStrategy[float]) -> Tensor:
    cells = draw.draw(st.lists(of, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(cells, dtype=torch.float32).view(rows, columns)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 40), st.sampled_from([values, st.sampled_from(FEW)]))
def test_rows_without_their_lowest_equal_torch(data, rows, columns, of):
    scores = scores_of(data, rows, columns, of)
    removed = data.draw(st.integers(1, columns))
    assert torch.equal(without_lowest(scores, removed), without_lowest_in_torch(scores, removed))
    assert torch.equal(without_lowest(scores.T.contiguous().T, removed), without_lowest_in_torch(scores, removed))
    if not scores.isnan().any():
        expected = [reference.drop_lowest(row, removed) for row in scores.numpy()]
        assert np.array_equal(without_lowest(scores, removed).numpy(), expected)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([(1, 2), (2, 4), (1, 3), (5, 8), (3, 5), (15, 16), (1, 32)]), st.integers(1, 3))
def test_the_best_of_groups_equal_torch(data, nm, rows):
    n, m = nm
    scores = scores_of(data, rows, m * data.draw(st.integers(1, 5)), data.draw(st.sampled_from([values, st.just(NAN)])))
    assert torch.equal(best_of_groups(scores, n, m), best_of_groups_in_torch(scores, n, m))
    if not scores.isnan().any():
        assert np.array_equal(best_of_groups(scores, n, m).numpy(), reference.n_of_m(scores.numpy(), n, m))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 100_003), (1, 3), (7, 5003), (2, 1)])
def test_large_and_tiny_rows_on_several_threads(shape, threads):
    draw = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scores in (
            torch.randn(shape, generator=draw).abs(),
            torch.randint(-3, 3, shape, generator=draw).float() * 1e-40,  # denormal, tied
            torch.full(shape, 2.0),
            torch.randn(shape, generator=draw).where(torch.rand(shape, generator=draw) < 0.7, NAN),
        ):
            for removed in {1, max(shape[1] // 3, 1), shape[1] // 2 + 1, shape[1]}:
                assert torch.equal(without_lowest(scores, removed), without_lowest_in_torch(scores, removed))
        groups = torch.randint(4, (37, 128), generator=draw).float().repeat(40, 1)
        for n, m in [(2, 4), (1, 2), (3, 8), (7, 16), (60, 128)]:
            assert torch.equal(best_of_groups(groups, n, m), best_of_groups_in_torch(groups, n, m))
    finally:
        torch.set_num_threads(before)


def test_other_scores_go_to_torch(monkeypatch):
    scores = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = best_of_groups(scores.float(), 2, 4), without_lowest(scores.float(), 7)
    assert torch.equal(best_of_groups(scores, 2, 4), wanted[0])
    assert torch.equal(without_lowest(scores, 7), wanted[1])
    assert without_lowest(scores[:0], 7).shape == best_of_groups(scores[:0].float(), 2, 4).shape == (0, 24)
    monkeypatch.setattr(masks, "library", lambda: None)
    assert torch.equal(best_of_groups(scores.float(), 2, 4), wanted[0])
    assert torch.equal(without_lowest(scores.float(), 7), wanted[1])
