"""Every method of the table through the same tests, and each against its slow reference."""

import numpy as np
import pytest
import torch
from reference.magnitude import magnitude
from reference.ria import ria
from reference.sparsegpt import sparsegpt
from reference.wanda import wanda
from support.every_method import PATTERNS, EveryMethod, layer, mask_rule, run

from secateur.errors import NotSolved
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.base import scored
from secateur.methods.least_squares import ridge
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import NM, Unstructured, kind_of
from secateur.methods.sparsegpt import damped
from secateur.methods.statistics import Stats
from secateur.methods.together import Stacked

NAMES = [
    *METHODS,
    *(f"{method}+{refinement}" for refinement in REFINEMENTS for method in METHODS
      if refinement != "swap" or not METHODS[method].updates),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod(EveryMethod):
    """The checks that every method passes, for the methods of the table."""


def test_a_stack_of_patterns_asks_each_of_its_own_rows():
    scores = torch.rand(10, 8, generator=torch.Generator().manual_seed(1))
    parts = (parse_pattern("50% of matrix"), parse_pattern("25% of row"))
    stacked = Stacked((6, 4), parts)
    expected = torch.cat([parts[0].mask(scores[:6]), parts[1].mask(scores[6:])])
    assert torch.equal(stacked.mask(scores), expected)
    assert stacked.sparsity == pytest.approx((0.5 * 6 + 0.25 * 4) / 10)
    assert stacked.kind == "unstructured"
    assert kind_of([parse_pattern("2:4"), parse_pattern("50%")]) == "semi-structured + unstructured"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_equals_its_reference(pattern):
    weight, x = layer()
    resolved = parse_pattern(pattern).within("matrix")
    expected, kept = magnitude(weight.numpy(), mask_rule(resolved))
    pruned = run("magnitude", pattern, weight, x)
    assert (pruned.kept.numpy() == kept).all()
    assert (pruned.weight.numpy() == expected).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_equals_its_reference(pattern):
    weight, x = layer()
    resolved = parse_pattern(pattern).within("row")
    expected, kept = wanda(weight.numpy(), x.numpy(), mask_rule(resolved))
    pruned = run("wanda", pattern, weight, x)
    assert (pruned.kept.numpy() == kept).all()
    assert (pruned.weight.numpy() == expected).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_within_a_ten_thousandth_of_its_reference(pattern):
    weight, x = layer(rows=16)
    x[:, [3, 140]] = 0  # inputs that no token uses
    resolved = parse_pattern(pattern).within("matrix")
    if isinstance(resolved, NM):
        expected, kept = sparsegpt(weight.numpy(), x.numpy(), (resolved.n, resolved.m))
    else:
        assert isinstance(resolved, Unstructured)
        expected, kept = sparsegpt(weight.numpy(), x.numpy(), resolved.ratio, resolved.over or "matrix")
    pruned = run("sparsegpt", pattern, weight, x)
    assert (pruned.kept.numpy() == kept).all()
    difference = np.linalg.norm(pruned.weight.numpy() - expected) / max(np.linalg.norm(expected), 1e-9)
    assert difference < 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ria_equals_its_reference(pattern):
    weight, x = layer()
    expected, kept = ria(weight.numpy(), x.numpy(), mask_rule(parse_pattern(pattern).within("matrix")))
    pruned = run("ria", pattern, weight, x)
    assert (pruned.kept.numpy() == kept).all()
    assert (pruned.weight.numpy() == expected).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sweep_is_the_published_algorithm_in_normalised_coordinates(pattern):
    """There the mean of the diagonal is 1, so the reference's damping is what `ridge` says."""
    weight, x = layer(rows=16)
    resolved = parse_pattern(pattern).within("matrix")
    ratio = (resolved.n, resolved.m) if isinstance(resolved, NM) else resolved.sparsity
    over = getattr(resolved, "over", None) or "matrix"
    scale = x.double().square().mean(0).sqrt().numpy()
    damping = ridge(Stats.of(x, {"gram"}))
    expected, kept = sparsegpt(weight.numpy() * scale, x.numpy() / scale, ratio, over, damping)
    pruned = run("sweep", pattern, weight, x)
    found = pruned.weight.numpy() * scale
    assert (pruned.kept.numpy() == kept).mean() > 0.9995
    same = (pruned.kept.numpy() == kept).all(1)  # a row depends on the others through the mask alone
    assert same.mean() >= 0.8
    assert np.linalg.norm(found[same] - expected[same]) <= 1e-4 * np.linalg.norm(expected[same])
    # A weight is exchanged for one whose score is the same but for rounding, so what the rows lose is the same.
    inputs = x.double().numpy() / scale
    losses = [np.linalg.norm(inputs @ (v - weight.numpy() * scale).T) for v in (found, expected)]
    assert abs(losses[0] - losses[1]) <= 1e-3 * losses[1] + 1e-6 * np.linalg.norm(inputs @ expected.T)


def test_sparsegpt_groups_do_not_straddle_the_edge_of_a_column_block():
    """1:3 in blocks of 128 columns: the reference code leaves 23 % of the groups invalid."""
    weight, x = layer(columns=252)
    kept = run("sparsegpt", "1:3", weight, x).kept
    assert (kept.unflatten(1, (-1, 3)).sum(-1) == 1).all()


def test_sparsegpt_leaves_less_error_than_wanda_and_wanda_less_than_magnitude():
    weight, x = layer(tokens=4000)
    errors = {}
    for name in METHODS:
        change = run(name, "2:4", weight, x).weight - weight
        errors[name] = (x @ change.T).square().sum().item()
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_the_scale_of_the_inputs_does_not_matter():
    weight, x = layer()
    for name in METHODS:
        assert torch.equal(run(name, "2:4", weight, x).kept, run(name, "2:4", weight, x * 1024).kept)


def test_an_input_without_any_token_loses_only_its_share():
    """With all-zero statistics the reference code zeroes whole matrices."""
    weight, x = layer()
    pruned = run("sparsegpt", "50%", weight, torch.zeros_like(x))
    assert (pruned.weight == 0).sum() == weight.numel() // 2


def test_damping_is_relative_to_the_mean_diagonal_of_the_inputs_that_were_used():
    gram = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    assert torch.allclose(damped(gram, 0.01), torch.diag(torch.tensor([1.02, 3.02, 2.02])))
    assert gram[2, 2] == 0


def test_a_failing_factorisation_raises_the_damping_and_says_so():
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # not positive definite until the diagonal grows
    pruned = METHODS["sparsegpt"].prune(torch.randn(4, 8), Stats(1, {"gram": gram}), parse_pattern("50% of matrix"))
    assert pruned.note == "damping raised from 0.01 to 0.1"


def test_a_hopeless_factorisation_is_an_error_and_never_the_identity():
    gram = torch.eye(8) - 20 * torch.ones(8, 8) * (1 - torch.eye(8))
    with pytest.raises(NotSolved, match="not positive definite, even with damping 10"):
        METHODS["sparsegpt"].prune(torch.randn(4, 8), Stats(1, {"gram": gram}), parse_pattern("50% of matrix"))


def test_a_score_that_is_the_weight_itself_does_no_harm():
    """The pruned weights take the memory of the scores."""
    weight = torch.randn(4, 8, requires_grad=True)
    before = weight.detach().clone()
    pruned = scored((), "row", lambda w, stats: w).prune(weight, Stats(1, {}), parse_pattern("50% of row"))
    assert torch.equal(weight, before)
    assert torch.equal(pruned.weight, before.where(pruned.kept, 0.0))
