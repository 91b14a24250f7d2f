"""Sums over tokens: every instruction set of gram.c and torch against float64."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.kernels import gram as module
from secateur.kernels.gram import KINDS, add_products, add_squares
from secateur.kernels.library import ISAS, isa, library

needs_library = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")
SHAPES = [(1, 1), (2, 48), (300, 49), (513, 97), (4099, 20), (1030, 1100)]
"""Odd and even numbers of tokens and of columns; more tokens, and more columns, than are taken at a time."""


def available() -> list[int]:
    found = isa()
    return [] if found is None else list(range(ISAS.index(found) + 1))


def inputs(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """With a mean, so that what lies off the diagonal is not noise, and one massive channel."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) + 0.3
    x[:, 0] *= 300
    return x.to(dtype)


def close(found: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> bool:
    """To the rounding of float32 sums, in units of what a sum of that many products can be at most."""
    size = left.double().norm(dim=0)[:, None] * right.double().norm(dim=0)
    return bool(((found - wanted).abs() <= 3e-6 * size).all())


@needs_library
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("use", available(), ids=lambda use: ISAS[use])
def test_products_are_those_of_float64(use, dtype, monkeypatch):
    monkeypatch.setattr(module, "best", lambda: use)
    for shape in SHAPES:
        x, other = inputs(*shape, dtype), inputs(*shape, dtype, seed=1)
        for right in (x, other):
            total = torch.ones(shape[1], shape[1], dtype=torch.float64)
            add_products(total, x, right)
            assert close(total, 1 + x.double().T @ right.double(), x, right), shape
        total = torch.ones(shape[1], dtype=torch.float64)
        add_squares(total, x)
        assert torch.allclose(total, 1 + x.double().square().sum(0), rtol=3e-6, atol=0), shape


@pytest.mark.parametrize(("name", "value"), [("CHUNK", module.TOKENS_AT_A_TIME), ("SHORT", module.SHORT)])
def test_both_sides_count_tokens_alike(name, value):
    source = (Path(module.__file__).parent / "native" / Path(module.__file__).name).with_suffix(".c").read_text()
    assert re.search(rf"\b{name} = (\d+)", source).group(1) == str(value)  # type: ignore[union-attr]


@needs_library
def test_a_gram_matrix_is_symmetric_to_the_bit_whatever_the_threads(monkeypatch):
    x, totals = inputs(700, 500, torch.float32), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        totals.append(torch.zeros(500, 500, dtype=torch.float64))
        add_products(totals[-1], x, x)
    assert torch.equal(totals[0], totals[0].T)
    assert all(torch.equal(total, totals[0]) for total in totals)


@needs_library
def test_columns_that_are_not_contiguous():
    x = inputs(40, 60, torch.float32)
    found, wanted = (torch.zeros(30, 30, dtype=torch.float64) for _ in range(2))
    view = x[:, ::2]
    add_products(found, view, view)
    add_products(wanted, view.clone(), view.clone())
    assert close(found, wanted, view, view)


@pytest.mark.parametrize("dtype", [*KINDS, torch.float16], ids=str)
def test_without_the_library(dtype, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    x, other = inputs(3000, 50, dtype), inputs(3000, 50, dtype, seed=1)
    total, squares = torch.zeros(50, 50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    add_products(total, x, other)
    add_squares(squares, x)
    assert close(total, x.double().T @ other.double(), x, other)
    assert torch.allclose(squares, x.double().square().sum(0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_what_is_not_finite_shows(dtype, bad):
    x = inputs(50, 100, dtype)
    x[20, 60] = bad
    total, squares = torch.zeros(100, 100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    add_products(total, x, x)
    add_squares(squares, x)
    assert not total[60].isfinite().any()
    assert total[:60, :60].isfinite().all()
    assert squares.isfinite().sum() == 99
