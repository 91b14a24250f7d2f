"""Solvers on a fixed mask against exact least squares; ALPS, swap and refit against slow, obvious versions."""

import numpy as np
import pytest
import torch
from reference.alps import alps as reference_alps
from reference.least_squares import exact
from reference.least_squares import objective as cost
from reference.refit import refit as reference_refit
from reference.swap import swap as reference_swap
from support.every_method import mask_rule

from secateur.errors import UnknownName
from secateur.methods import METHODS, find_method
from secateur.methods.alps import alps
from secateur.methods.least_squares import masked_least_squares, normalise, objective, ridge
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.refit import refit
from secateur.methods.statistics import Stats


def layer(rows: int = 24, columns: int = 96, tokens: int = 3200, seed: int = 0):
    """A weight and inputs with a power-law spectrum and unequal scales."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=draw))[0]
    spectrum = torch.arange(1, columns + 1).float().pow(-0.8)
    scale = torch.randn(columns, generator=draw).exp()
    return weight, torch.randn(tokens, columns, generator=draw) * spectrum @ basis * scale


def error(weight, pruned, x) -> float:
    return ((x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()).item()


def stats_of(x) -> Stats:
    return Stats.of(x, {"gram", "square"})


@pytest.mark.parametrize("pattern", ["50% of matrix", "70% of row", "2:4"])
def test_many_iterations_reach_exact_least_squares(pattern):
    weight, x = layer()
    stats = stats_of(x)
    kept = METHODS["wanda"].prune(weight, stats, parse_pattern(pattern)).kept
    problem = normalise(weight, stats)
    solution = masked_least_squares(problem, kept, problem.weight, 400)
    expected = exact(weight.numpy(), x.numpy(), kept.numpy(), ridge(stats))
    found = problem.restore(solution, kept, weight).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-3
    residual = (problem.target - solution @ problem.gram).where(kept, 0.0)  # the gradient on the mask
    assert residual.norm() / problem.target.norm() < 1e-4


@pytest.mark.parametrize("start", ["sweep", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50%", "70%", "2:4"])
def test_twenty_iterations_after_a_sweep_are_within_two_percent_of_exact(pattern, start):
    weight, x = layer(tokens=32 * 96)
    stats = stats_of(x)
    method = refit(find_method(start), 20)
    pruned = method.prune(weight, stats, parse_pattern(pattern).within(method.group))
    best = torch.from_numpy(exact(weight.numpy(), x.numpy(), pruned.kept.numpy(), ridge(stats))).float()
    assert error(weight, pruned.weight, x) <= 1.02 * error(weight, best, x)


@pytest.mark.parametrize("iterations", [1, 2, 5, 50])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_no_row_is_worse_than_its_start(name, iterations):
    weight, x = layer(tokens=50)  # fewer tokens than inputs: a singular Gram matrix
    stats = stats_of(x)
    pruned = find_method(name).prune(weight, stats, parse_pattern("50% of row"))
    problem = normalise(weight, stats)
    start = pruned.weight * problem.scale
    solution = masked_least_squares(problem, pruned.kept, start, iterations)
    assert (objective(problem, solution) <= objective(problem, start)).all()
    assert (solution[~pruned.kept] == 0).all()


def test_a_full_mask_gives_the_dense_weight_back():
    """The ridge pulls to the dense weights, not to zero."""
    weight, x = layer(tokens=20)
    stats = stats_of(x)
    kept = torch.ones_like(weight, dtype=torch.bool)
    problem = normalise(weight, stats)
    solution = masked_least_squares(problem, kept, torch.zeros_like(weight), 300)
    assert torch.allclose(problem.restore(solution, kept, weight), weight, atol=2e-3)


def test_inputs_that_no_token_uses_keep_their_dense_weights():
    weight, x = layer()
    x[:, 7] = 0
    for name in ("wanda+refit", "sweep", "alps"):
        method = find_method(name)
        pruned = method.prune(weight, stats_of(x), parse_pattern("0%").within(method.group))
        assert torch.equal(pruned.weight[:, 7], weight[:, 7])
        assert pruned.weight.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "damping"), [(32 * 96, 0.01), (1000 * 96, 0.01), (16 * 96, 0.02), (96, 0.1), (1, 0.1)]
)
def test_the_ridge_grows_as_tokens_become_few(tokens, damping):
    assert ridge(Stats(tokens, {"gram": torch.eye(96)})) == pytest.approx(damping)


@pytest.mark.parametrize("massive", [4096.0, 3000.0])
@pytest.mark.parametrize(("name", "above_best"), [("wanda+refit", 1.02), ("sweep", 3.0), ("alps", 1.02)])
def test_scales_of_the_inputs_do_not_matter_to_the_solvers(name, above_best, massive):
    """Relative damping: a massive channel changes nothing for the others.

    A power of two changes no mantissa, so the weights are the same. Another scale rounds otherwise, which moves weights
    along what the inputs hardly tell apart, so that the output is what has to be the same.
    """
    weight, x = layer()
    scale = torch.ones(96)
    scale[[3, 50]] = massive
    method = find_method(name)
    one = method.prune(weight, stats_of(x), parse_pattern("2:4"))
    other = method.prune(weight / scale, stats_of(x * scale), parse_pattern("2:4"))
    assert (one.kept != other.kept).float().mean() < 0.002
    if massive == 4096:
        assert torch.allclose(one.weight, other.weight * scale, rtol=1e-2, atol=1e-2)
    best = torch.from_numpy(exact(weight.numpy(), x.numpy(), one.kept.numpy(), ridge(stats_of(x)))).float()
    errors = [error(weight, v, x) for v in (one.weight, other.weight * scale)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert max(errors) <= above_best * error(weight, best, x)


@pytest.mark.parametrize("pattern", ["2:4", "50% of row", "61.8% of matrix"])
def test_alps_follows_the_textbook_iteration(pattern):
    weight, x = layer(rows=6, columns=24, tokens=1000)
    stats = stats_of(x)
    found = alps(stages=3, updates=2, iterations=0).prune(weight, stats, parse_pattern(pattern))
    penalties = np.geomspace(0.05, 5, 3)
    expected, kept = reference_alps(
        weight.numpy(), x.numpy(), mask_rule(parse_pattern(pattern)), ridge(stats), penalties, updates=2
    )
    assert (found.kept.numpy() == kept).all()
    assert np.allclose(found.weight.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["50% of row", "2:4"])
def test_swap_makes_the_best_exchange_and_then_none_is_left(pattern, start):
    weight, x = layer(rows=8, columns=12, tokens=400)
    stats = stats_of(x)
    base = find_method(start).prune(weight, stats, parse_pattern(pattern))
    found = find_method(f"{start}+swap").prune(weight, stats, parse_pattern(pattern))
    groups = [range(12)] if pattern != "2:4" else [range(i, i + 4) for i in range(0, 12, 4)]
    kept = reference_swap(weight.numpy(), x.numpy(), base.kept.numpy(), groups, ridge(stats))
    assert (kept != base.kept.numpy()).any()  # or nothing is tested
    assert (found.kept.numpy() == kept).all()
    assert torch.equal(found.weight, weight.where(found.kept, 0.0))


@pytest.mark.parametrize("iterations", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50% of row", "2:4"])
def test_refit_takes_the_textbook_steps(pattern, start, iterations):
    """In float32 directions lose their conjugacy after about six steps: from there on convergence is delayed."""
    weight, x = layer()
    stats = stats_of(x)
    method = find_method(start)
    base = method.prune(weight, stats, parse_pattern(pattern))
    found = refit(method, iterations).prune(weight, stats, parse_pattern(pattern))
    assert torch.equal(found.kept, base.kept)
    w, inputs, damping = weight.numpy(), x.numpy(), ridge(stats)

    def after(steps: int) -> np.ndarray:
        return reference_refit(w, inputs, base.kept.numpy(), base.weight.numpy(), damping, steps)

    if iterations <= 5:
        assert np.linalg.norm(found.weight.numpy() - after(iterations)) <= 1e-4 * np.linalg.norm(after(iterations))
    else:
        reached = cost(w, found.weight.numpy(), inputs, damping)
        assert (reached <= cost(w, after(iterations * 2 // 3), inputs, damping)).all()


def test_swap_after_a_method_that_changes_weights_is_refused():
    with pytest.raises(UnknownName, match="There is no refinement 'swap' after a method that changes weights"):
        find_method("alps+swap")


def test_unknown_refinements_are_named():
    with pytest.raises(UnknownName, match=r"There is no refinement 'refti'. Did you mean 'refit'\?"):
        find_method("wanda+refti")


def test_a_dense_target_aims_at_the_dense_output():
    """With inputs that the pruned prefix has bent, the solution comes nearer to W x_dense than a symmetric one."""
    weight, dense = layer()
    draw = torch.Generator().manual_seed(5)
    bend = torch.eye(96) + 0.1 * torch.randn(96, 96, generator=draw)
    x = dense @ bend
    kept = METHODS["wanda"].prune(weight, stats_of(x), parse_pattern("2:4")).kept
    errors = []
    for needed in ({"gram"}, {"gram", "cross"}):
        problem = normalise(weight, Stats.of(x, needed, dense))
        solution = problem.restore(masked_least_squares(problem, kept, problem.weight, 200), kept, weight)
        errors.append((dense @ weight.T - x @ solution.T).square().sum().item())
    assert errors[1] < 0.7 * errors[0]
