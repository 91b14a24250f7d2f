"""The sweep over the columns: the C and the torch one against each other and against least squares in float64."""

import pytest
import torch
from support.sweeping import block_of, gram_of

from secateur.kernels.library import ISAS, isa, library
from secateur.methods import column_sweep as module
from secateur.methods.column_sweep import block_width, responses, sweep, sweep_block, sweep_block_in_torch
from secateur.methods.patterns import NM, Pattern, Unstructured
from secateur.methods.together import Stacked

needs_library = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")


def available() -> list[int]:
    found = isa()
    return [] if found is None else list(range(ISAS.index(found) + 1))


def test_responses_are_least_squares():
    """What the weights from a block on answer to a change of the earlier ones, the block's own part of it."""
    gram = gram_of(20)
    answers = responses(gram, 8)
    change = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for start in (8, 16):
        wanted = torch.linalg.solve(gram[start:, start:], gram[start:, :start] @ change[:, :start].T).T
        stop = min(start + 8, 20)
        assert torch.allclose(change[:, :start] @ answers[:start, start:stop], wanted[:, : stop - start], atol=1e-9)
        assert not answers[start:, :start].any()


def test_blocks_on_the_diagonal_are_those_of_the_inverse_factor():
    """U upper triangular with Uᵀ U = H⁻¹, by another way: the Cholesky factor of the inverse."""
    gram = gram_of(20)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    answers = responses(gram, 8)
    for start in (0, 8, 16):
        here = slice(start, start + 8)
        assert torch.allclose(answers[here, here], upper[here, here], atol=1e-9)


def test_a_gram_matrix_that_is_not_positive_definite_raises():
    with pytest.raises(RuntimeError, match="positive-definite"):
        responses(torch.ones(4, 4) - 2 * torch.eye(4), 2)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "matrix"), Unstructured(0.3, "row"), NM(2, 4), NM(1, 3)])
def test_every_row_is_what_optimal_brain_surgeon_leaves(pattern):
    """Given the mask, each weight that goes is answered by all later ones, with the inverse of what is still free."""
    columns = 36
    gram, draw = gram_of(columns), torch.Generator().manual_seed(2)
    weight = torch.randn(5, columns, dtype=torch.float64, generator=draw)
    width = block_width(pattern, 12)
    kept, swept = sweep(weight, responses(gram, width), torch.ones(columns), pattern, width)
    wanted = weight.clone()
    for j in range(columns):
        inverse = torch.linalg.inv(gram[j:, j:])
        gone = wanted[:, j].where(~kept[:, j], 0.0)
        wanted[:, j:] -= gone[:, None] * inverse[0] / inverse[0, 0]
        wanted[:, j] = wanted[:, j].where(kept[:, j], 0.0)
    assert torch.allclose(swept, wanted, atol=1e-9)


def test_the_width_of_a_block_changes_no_n_of_m_mask():
    weight, gram = block_of(6, 48)[0].double(), gram_of(48)
    results = [sweep(weight, responses(gram, width), torch.ones(48), NM(2, 4), width) for width in (4, 20, 48, 64)]
    for kept, swept in results[1:]:
        assert torch.equal(kept, results[0][0])
        assert torch.allclose(swept, results[0][1], atol=1e-9)


CHOOSING = [
    NM(2, 4), NM(1, 2), NM(5, 8), NM(1, 3), NM(4, 6), NM(12, 24),
    Stacked((10, 27), (NM(2, 4), NM(1, 4))),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("use", available())
@pytest.mark.parametrize("pattern", CHOOSING, ids=lambda p: str(getattr(p, "parts", p)))
def test_compiled_blocks_choose_as_torch_does(pattern, use, monkeypatch):
    monkeypatch.setattr(module, "best", lambda: use)
    for width in (24, 120):
        values, inverse, alive = block_of(37, width)
        values[:, :9] = values[:, :9].sign()  # ties
        wanted, found = values.clone(), values.clone()
        expected = sweep_block_in_torch(wanted, inverse, alive, pattern, None)
        kept = sweep_block(found, inverse, alive, pattern, None)
        assert torch.equal(kept, expected)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert not found[~kept].any()
        assert not found[~kept].signbit().any()


@needs_library
@pytest.mark.parametrize("use", available())
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (15, 7), (33, 126), (100, 5)])
def test_compiled_blocks_sweep_a_given_mask_as_torch_does(shape, use, monkeypatch):
    monkeypatch.setattr(module, "best", lambda: use)
    values, inverse, alive = block_of(*shape)
    for share in (0.0, 0.5, 1.0):
        given = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share
        wanted, found = values.clone(), values.clone()
        sweep_block_in_torch(wanted, inverse, alive, Unstructured(0.5), given)
        assert torch.equal(sweep_block(found, inverse, alive, Unstructured(0.5), given), given)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert not found[~given].signbit().any()


@needs_library
def test_groups_choose_as_patterns_do_where_scores_are_nan_or_tied():
    """A block as wide as a group, so that nothing is updated before it is chosen."""
    values = torch.tensor(
        [[float("nan"), 1.0, 1.0, 2.0], [0.0, -0.0, 0.0, 0.0], [3.0, float("inf"), float("nan"), 1.0]]
    )
    for alive in (torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, False])):
        kept = sweep_block(values.clone(), torch.eye(4), alive, NM(2, 4), None)
        assert torch.equal(kept, NM(2, 4).mask(values.square() * alive))


@needs_library
@pytest.mark.parametrize("threads", [2, 3])
def test_rows_do_not_depend_on_their_thread_or_their_neighbours(threads):
    before = torch.get_num_threads()
    values, inverse, alive = block_of(37, 64)
    alone = values.clone()
    kept = sweep_block(alone, inverse, alive, NM(2, 4), None)
    torch.set_num_threads(threads)
    try:
        together = values.clone()
        assert torch.equal(sweep_block(together, inverse, alive, NM(2, 4), None), kept)
        assert torch.equal(together, alone)
        some = values[5:9].clone()
        assert torch.equal(sweep_block(some, inverse, alive, NM(2, 4), None), kept[5:9])
        assert torch.equal(some, alone[5:9])
    finally:
        torch.set_num_threads(before)


class Odd(NM):
    """A pattern of groups that sweep.c does not know."""

    @property
    def chunk(self) -> int:
        return 2 * self.m


@pytest.mark.parametrize(
    "pattern",
    [
        Stacked((3, 5), (Unstructured(0.5, "matrix"), Unstructured(0.25, "row"))),
        Stacked((3, 5), (NM(2, 4), Odd(1, 2))),
        Odd(2, 4),
    ],
)
def test_whatever_the_pattern_the_whole_sweep_is_that_without_a_compiler(pattern: Pattern, monkeypatch):
    weight, _, alive = block_of(8, 80)
    gram = gram_of(80).float()
    width = block_width(pattern, 32)
    kept, swept = sweep(weight, responses(gram, width), alive, pattern, width)
    monkeypatch.setattr(module, "library", lambda: None)
    expected, wanted = sweep(weight, responses(gram, width), alive, pattern, width)
    assert torch.equal(kept, expected)
    assert torch.allclose(swept, wanted, rtol=1e-4, atol=1e-5)
    assert kept[:3].float().mean() == 0.5
