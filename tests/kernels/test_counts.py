"""Numbers counted in C, against counting them one by one."""

import math

import pytest
import torch
from torch import Tensor

from secateur.kernels import counts
from secateur.kernels.counts import BITS, GROUPS, Counts, count, count_in_torch
from secateur.kernels.library import library


def one_by_one(weight: Tensor) -> Counts:
    rows = weight.double().reshape(-1, weight.shape[-1]).tolist()
    flat = [number for row in rows for number in row]
    groups = {of: [row[i : i + of] for row in rows for i in range(0, len(row) // of * of, of)] for of in GROUPS}
    return Counts(
        sum(number == 0 for number in flat),
        sum(number == 0 and math.copysign(1, number) < 0 for number in flat),
        sum(map(math.isnan, flat)),
        sum(map(math.isinf, flat)),
        tuple(max((sum(number != 0 for number in group) for group in groups[of]), default=0) for of in GROUPS),
    )


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 16), (2, 3, 24), (5, 1000), (2, 4001), (0, 8)], ids=str)
def test_every_number_is_counted(dtype, shape, monkeypatch):
    weight = torch.randn(shape).where(torch.rand(shape) < 0.4, 0.0)
    for place, odd in enumerate((-0.0, math.nan, math.inf, -math.inf)[: weight.numel()]):
        weight.view(-1)[-1 - place] = odd
    weight = weight.to(dtype)
    expected = one_by_one(weight)
    assert count(weight) == count_in_torch(weight) == expected
    strided = torch.stack([weight, weight], -1)[..., 0]  # as it does not lie in memory
    assert count(strided) == expected
    monkeypatch.setattr(counts, "library", lambda: None)
    assert count(weight) == expected


@pytest.mark.skipif(library() is None, reason="the package was installed without a compiler")
def test_the_densest_group_is_found_wherever_it_is():
    weight = torch.zeros(3, 7680)
    for row, column in (
        (0, 0),
        (1, 236),
        (2, 240),
        (2, 3839),
        (1, 3840),
        (2, 7679),
    ):  # ends of what is counted at a time among them
        weight[row, column] = 1
        assert count(weight).densest == (1, 1, 1)
        weight[row, column] = 0
    weight[1, 239], weight[1, 240] = 1, 1  # neighbours of two groups of 16
    assert count(weight).densest == (1, 1, 1)
    weight[1, 241:244] = 1
    assert count(weight).densest == (4, 4, 4)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_what_comes_behind_a_full_group_is_counted(dtype):
    weight = torch.ones(2, 8000)
    weight[:, 5000:5003] = torch.tensor([0.0, -0.0, math.nan])
    assert count(weight.to(dtype)) == Counts(4, 2, 2, 0, (4, 8, 16))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4), (0, 0)])
def test_a_matrix_without_numbers_has_none_of_any_kind(shape):
    """Found by fuzzing: rows of no columns could not be shaped."""
    assert count(torch.zeros(shape)) == Counts(0, 0, 0, 0, (0, 0, 0))
