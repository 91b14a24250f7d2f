"""Repair against rows of stacked least squares, and every selection against its slow reference."""

import pytest
import torch
from reference.structured import energies, fluctuations, greedy_removal, ridge_refit

from secateur.errors import NotSolved
from secateur.methods.least_squares import ridge
from secateur.methods.statistics import OF_DENSE, Stats
from secateur.pruning.structured.channel_scores import SELECTIONS, energy, fluctuation, optimal_brain_surgeon
from secateur.pruning.structured.reconstruct import NEED, reconstructed

OUT, IN, TOKENS = 12, 40, 2000


def layer(seed: int = 0):
    """A weight, a bias, inputs that are correlated, off zero and of unequal scale, and such inputs of a dense model."""
    draw = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(OUT, IN, generator=draw), torch.randn(OUT, generator=draw)
    mix = torch.randn(IN, IN, generator=draw) / IN**0.5 + torch.eye(IN)
    x = (torch.randn(TOKENS, IN, generator=draw) @ mix + torch.randn(IN, generator=draw)) * torch.rand(
        IN, generator=draw
    )
    dense = x + 0.1 * torch.randn(TOKENS, IN, generator=draw)
    kept = torch.ones(IN, dtype=torch.bool)
    kept[torch.randperm(IN, generator=draw)[:10]] = False
    return weight, bias, x, dense, kept


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("target", ["weights", "dense", "added"])
def test_repair_equals_stacked_least_squares(target, with_bias):
    weight, bias, x, dense, kept = layer()
    old = bias if with_bias else None
    stats = Stats.of(x, NEED | (OF_DENSE if target == "dense" else set()), dense if target == "dense" else None)
    wanted = (dense if target == "dense" else x) @ weight.T + (bias if with_bias else 0)
    added = None
    if target == "added":
        delta = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(5)) + x[:, :OUT].square()
        wanted = wanted + delta
        ones = torch.ones(TOKENS, 1)
        added = (delta.T @ torch.cat([x, ones], 1)) / TOKENS
    found = reconstructed(weight, stats, kept, old, added)
    slow, slow_bias = ridge_refit(weight, x, kept, ridge(stats), wanted, old)
    assert (found.weight[:, ~kept] == 0).all()
    assert (found.weight - slow).abs().max() <= 2e-4 * slow.abs().max()
    if with_bias:
        assert found.bias is not None
        assert slow_bias is not None
        assert (found.bias - slow_bias).abs().max() <= 2e-4 * slow_bias.abs().max()
    else:
        assert found.bias is None


def test_repair_of_nothing_changes_nothing():
    weight, bias, x, _, _ = layer()
    found = reconstructed(weight, Stats.of(x, NEED), torch.ones(IN, dtype=torch.bool), bias)
    assert torch.allclose(found.weight, weight, atol=1e-3)
    assert found.bias is not None
    assert torch.allclose(found.bias, bias, atol=1e-3)


def test_repair_beats_leaving_the_rest_alone():
    weight, bias, x, _, kept = layer()
    wanted = x @ weight.T + bias
    alone = (wanted - x @ (weight * kept).T - bias).square().sum()
    mean = x.mean(0)
    compensated = (wanted - x @ (weight * kept).T - bias - (weight * ~kept) @ mean).square().sum()
    found = reconstructed(weight, Stats.of(x, NEED), kept, bias)
    error = (wanted - x @ found.weight.T - found.bias).square().sum()
    assert error < compensated < alone


def test_inputs_that_are_always_zero_keep_their_weights():
    weight, _, x, _, kept = layer()
    x[:, kept.nonzero()[0]] = 0
    found = reconstructed(weight, Stats.of(x, NEED), kept)
    assert torch.equal(found.weight[:, kept.nonzero()[0]], weight[:, kept.nonzero()[0]])


def test_statistics_that_cannot_be_factorised_are_named():
    weight, _, x, _, kept = layer()
    stats = Stats.of(x, NEED)
    stats.sums["gram"][3, 4] = stats.sums["gram"][4, 3] = 1e9
    with pytest.raises(NotSolved, match="without '\\+repair'"):
        reconstructed(weight, stats, torch.ones_like(kept))


SINGLE = torch.arange(IN)[:, None]
HEADS = torch.arange(IN).view(8, 5)


@pytest.mark.parametrize("units", [SINGLE, HEADS], ids=["channels", "heads"])
class TestSelections:
    def test_energy(self, units):
        weight, _, x, _, _ = layer()
        slow = energies(weight, x, units)
        assert torch.allclose(energy(weight, Stats.of(x, {"gram"}), units).double(), slow, rtol=1e-4)

    def test_fluctuation(self, units):
        weight, _, x, _, _ = layer()
        slow = fluctuations(weight, x, units)
        found = fluctuation(weight, Stats.of(x, {"gram", "sum"}), units)
        assert torch.allclose(found.double(), slow, rtol=1e-3, atol=1e-5)

    def test_surgeon_takes_what_the_best_refit_misses_least(self, units):
        weight, _, x, _, _ = layer()
        count = 4  # few enough that each goes in a round of its own
        stats = Stats.of(x, {"gram"})
        found = optimal_brain_surgeon(weight, stats, units, count)
        assert found.tolist() == greedy_removal(weight, x, units, count, ridge(stats))

    @pytest.mark.parametrize("name", sorted(SELECTIONS))
    def test_every_selection_takes_so_many_and_leaves_its_inputs_alone(self, name, units):
        weight, _, x, _, _ = layer()
        before = weight.clone()
        stats = Stats.of(x, SELECTIONS[name].need - {"taylor"})
        stats.sums["taylor"] = torch.rand(len(units))  # type: ignore[index]
        for count in (1, len(units) // 2, len(units) - 1):
            chosen = SELECTIONS[name].choose(weight, stats, units, count)
            assert len(chosen) == len(set(chosen.tolist())) == count
            assert chosen.tolist() == sorted(chosen.tolist())
            assert torch.equal(chosen, SELECTIONS[name].choose(weight, stats, units, count))
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("name", sorted(SELECTIONS.keys() - {"random", "taylor"}))
    def test_a_unit_that_does_nothing_goes_first(self, name, units):
        weight, _, x, _, _ = layer()
        weight[:, units[3]] = 0
        stats = Stats.of(x, SELECTIONS[name].need)
        assert SELECTIONS[name].choose(weight, stats, units, 1).tolist() == [3]
