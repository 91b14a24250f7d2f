"""Rounding that knows the mask: each solver against a slow float64 one, and what holds of every grid and method."""

import numpy as np
import pytest
import torch
from reference import rounding as reference
from support.every_method import layer
from support.sweeping import gram_of

from secateur.errors import BadPattern
from secateur.kernels import rounding as kernels
from secateur.kernels.library import library
from secateur.methods import METHODS, find_method
from secateur.methods.column_sweep import responses
from secateur.methods.cost import WIDTH, Cost
from secateur.methods.least_squares import Problem
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.rounding import (
    OnGrid,
    _descent,
    _fitted_scales,
    _units,
    codes_for,
    nearest,
    rounding_cost,
    sweep,
    with_values,
)
from secateur.methods.statistics import Stats
from secateur.methods.values import Values, find_codes, parse_values

GRIDS = ["int4 of group 32", "int3 of row", "nvfp4", "mxfp4", "int4 asymmetric of group 32", "int8", "fp8"]
COLUMNS = 160
"""More than a block of columns, and five groups of 32."""


def grid_of(text: str) -> Values:
    values = parse_values(text)
    assert values is not None
    return values


def problem_of(rows: int = 4, columns: int = COLUMNS) -> tuple[Problem, torch.Tensor]:
    """A problem in float64, and a mask of about a half."""
    draw = torch.Generator().manual_seed(3)
    gram = gram_of(columns)
    scale = gram.diagonal().sqrt()
    gram = gram / scale / scale[:, None]
    gram.fill_diagonal_(1.01)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=draw) * scale
    kept = torch.rand(rows, columns, generator=draw) < 0.5
    return Problem(weight, gram, weight @ gram, scale, torch.ones(columns, dtype=torch.bool)), kept


def started(problem: Problem, kept: torch.Tensor, values: Values) -> OnGrid:
    return nearest(problem, problem.weight, kept, values)


def levels_of(values: Values) -> np.ndarray:
    return reference.LEVELS[values.name]


@pytest.mark.parametrize("text", ["int4 of group 32", "int3 of row", "nvfp4"])
def test_scales_are_the_best_of_those_tried(text):
    values = grid_of(text)
    problem, kept = problem_of()
    grid = started(problem, kept, values)
    size = COLUMNS // grid.scales.shape[1]
    weight = (problem.weight / problem.scale * kept).numpy()
    for row in range(2):
        for group in range(grid.scales.shape[1]):
            here = slice(group * size, (group + 1) * size)
            most = np.abs(weight[row, here]).max() / values.grid.levels.highest
            tried = values.storable(torch.linspace(1, 0.4, 24) * most).numpy()
            best = reference.best_scale(weight[row, here], problem.scale.numpy()[here] ** 2, tried, levels_of(values))
            assert grid.scales[row, group].item() == pytest.approx(tried[best])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", ["int4 of group 32", "int3 of row", "nvfp4"])
def test_the_sweep_is_optimal_brain_quantisation(text, masked):
    values = grid_of(text)
    problem, kept = problem_of()
    kept = kept if masked else torch.ones_like(kept)
    grid = started(problem, kept, values)
    swept = sweep(responses(problem.gram, WIDTH), problem, problem.weight, kept, grid, values)
    units, _ = _units(problem, kept, grid, values)
    expected = reference.gptq(problem.weight.numpy(), problem.gram.numpy(), units.numpy(), levels_of(values))
    assert np.allclose(swept.weight.numpy(), expected, atol=1e-9)


def test_the_sweep_goes_by_the_order_that_it_is_given():
    values = grid_of("int4 of group 32")
    problem, kept = problem_of()
    grid = started(problem, kept, values)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(9))
    answers = responses(problem.gram[order][:, order], WIDTH)
    swept = sweep(answers, problem, problem.weight, kept, grid, values, order)
    units, _ = _units(problem, kept, grid, values)
    given = (problem.weight[:, order].numpy(), problem.gram[order][:, order].numpy(), units[:, order].numpy())
    expected = reference.gptq(*given, levels_of(values))
    assert np.allclose(swept.weight[:, order].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("columns", [64, COLUMNS])
@pytest.mark.parametrize("text", ["int4 of group 32", "int3 of row", "nvfp4"])
def test_descent_takes_the_best_of_all_levels(text, columns):
    values = grid_of(text)
    problem, kept = problem_of(columns=columns)
    grid = started(problem, kept, values)
    residual = problem.target - grid.weight @ problem.gram
    descended = _descent(problem, kept, grid, residual, values)
    units, _ = _units(problem, kept, grid, values)
    expected = reference.descent(
        grid.weight.numpy(), problem.gram.numpy(), problem.target.numpy(), units.numpy(), levels_of(values)
    )
    assert np.allclose(descended.weight.numpy(), expected, atol=1e-9)
    assert torch.allclose(residual, problem.target - descended.weight @ problem.gram, atol=1e-9)


def test_scales_are_fitted_by_least_squares():
    values = grid_of("int4 of group 32")
    problem, kept = problem_of()
    grid = started(problem, kept, values)
    residual = problem.target - grid.weight @ problem.gram
    fitted = _fitted_scales(problem, grid, residual, values)
    weight, gram, target = grid.weight.numpy().copy(), problem.gram.numpy(), problem.target.numpy()
    for row in range(len(weight)):
        for group in range(grid.scales.shape[1]):
            here = slice(32 * group, 32 * (group + 1))
            factor = reference.fitted_scale(weight[row], gram, target[row], here)
            scale = values.storable((grid.scales[row, group] * factor).float()).item()
            assert fitted.scales[row, group].item() == scale
            weight[row, here] *= scale / grid.scales[row, group].item()
    assert np.allclose(fitted.weight.numpy(), weight, atol=1e-6)


@pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")
@pytest.mark.parametrize("text", GRIDS)
def test_compiled_and_torch_round_alike(text):
    values = grid_of(text)
    draw = torch.Generator().manual_seed(5)
    rows, width = 37, 33
    weight = torch.randn(rows, width, generator=draw)
    units = (torch.rand(rows, width, generator=draw) + 0.5) / values.grid.most
    units[torch.rand(rows, width, generator=draw) < 0.4] = 0
    factor = (0.1 * torch.randn(width, width, generator=draw)).tril() + torch.eye(width)
    zeros = torch.randint(0, 4, (rows, width), generator=draw).float() if values.asymmetric else None
    for old in (None, torch.randn(rows, width, generator=draw)):
        ours, theirs = weight.clone(), weight.clone()
        given = {"old": old, "zero_points": zeros}
        kernels.round_columns(ours, units, factor, values.grid.levels, **given)
        kernels.round_columns_in_torch(theirs, units, factor, values.grid.levels, **given)
        # a sum in another order can tip a weight between two levels, and then those after it
        alike = ((ours - theirs).abs() <= 1e-5).all(1)
        assert alike.float().mean() > 0.9
        assert not ours[units == 0].any()


@pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")
@pytest.mark.parametrize("text", GRIDS)
def test_compiled_and_torch_choose_the_same_scales(text):
    values = grid_of(text)
    draw = torch.Generator().manual_seed(6)
    weight, importance = torch.randn(9, 3, 20, generator=draw), torch.rand(3, 20, generator=draw)
    scales = values.storable((torch.rand(11, 9, 3, generator=draw) + 0.5) / values.grid.most)
    zeros = torch.randint(0, 5, scales.shape, generator=draw).float() if values.asymmetric else None
    ours = kernels.best_scales(weight, importance, scales, values.grid.levels, zeros)
    theirs = kernels.best_scales_in_torch(weight, importance, scales, values.grid.levels, zeros)
    assert torch.equal(ours, theirs)


def many_tokens(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer with enough tokens for the damping to be small, as the solvers see it."""
    return layer(rows=rows, columns=columns, tokens=6000)


def solved(method: str, pattern: str, values: str, weight: torch.Tensor, x: torch.Tensor):
    with_grid = with_values(find_method(method), grid_of(values))
    stats = Stats.of(x, with_grid.need)
    return with_grid.prune(weight, stats, parse_pattern(pattern).within(with_grid.group)), stats


def output_error(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> float:
    return ((weight - other).double() @ x.double().T).square().sum().item()


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("pattern", ["0%", "50%", "2:4"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_zeros_and_weights_on_the_grid(name, pattern, text):
    weight, x = layer(rows=24, columns=64)
    if text.endswith("32") or name in ("best",):
        x = x.clone()
        x[:, 5] = 0  # an input that no token uses
    pruned, _ = solved(name, pattern, text, weight, x)
    assert not pruned.weight[~pruned.kept].any()
    assert pruned.kept.sum() == weight.numel() * (1 if pattern == "0%" else 0.5)
    stored = pruned.weight.bfloat16()
    assert find_codes(stored, grid_of(text)) is not None
    assert not (stored.signbit() & (stored == 0)).any()
    again, _ = solved(name, pattern, text, weight, x)
    assert torch.equal(pruned.weight, again.weight)


@pytest.mark.parametrize("pattern", ["0%", "50%", "2:4"])
@pytest.mark.parametrize("text", ["int4 of group 32", "int3 of group 32", "nvfp4", "int4 asymmetric of group 32"])
def test_each_solver_is_better_than_the_one_before(text, pattern):
    weight, x = many_tokens(48, 96)
    errors = {}
    for solver in ("descent", "sweep", "act-order", "nearest"):
        pruned, _ = solved("default", pattern, f"{text} by {solver}", weight, x)
        errors[solver] = output_error(weight, pruned.weight, x)
    assert errors["descent"] < errors["sweep"] < errors["nearest"]
    assert errors["descent"] < errors["act-order"] < errors["nearest"]


def test_levels_and_mask_chosen_jointly_are_better_at_few_bits():
    weight, x = many_tokens(48, 96)
    errors = [
        output_error(weight, solved("alps", "50%", f"int3 of group 32{by}", weight, x)[0].weight, x)
        for by in ("", " by joint")
    ]
    assert errors[1] < errors[0]


def test_a_matrix_of_which_one_input_is_alive_is_rounded():
    weight, x = layer(rows=16, columns=32)
    x = x.clone()
    x[:, 1:] = 0
    pruned, _ = solved("default", "50%", "int4 of row", weight, x)
    assert pruned.weight.isfinite().all()
    assert not pruned.weight[~pruned.kept].any()


def test_a_matrix_of_zeros_stays_zero():
    _, x = layer(rows=16, columns=32)
    pruned, _ = solved("default", "0%", "int4 of group 32", torch.zeros(16, 32), x)
    assert not pruned.weight.any()


def test_dense_targets_are_aimed_at_without_a_mask_too():
    """With dense inputs the best weights are not the dense ones; rounding goes to those."""
    weight, x = layer(rows=24, columns=64)
    dense = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    method = with_values(find_method("default+dense-target"), grid_of("int8"))
    stats = Stats.of(x, method.need, dense)
    pruned = method.prune(weight, stats, parse_pattern("0%").within("matrix"))
    wanted, to_dense = (weight.double() @ one.double().T for one in (dense, x))
    ours = pruned.weight.double() @ x.double().T
    assert (ours - wanted).square().sum() < 0.95 * (to_dense - wanted).square().sum()


@pytest.mark.parametrize("values", ["int4 of group 32", "int3 of row by sweep", "int4 by act-order"])
def test_what_was_pruned_towards_dense_inputs_is_rounded_to_itself(values):
    """Rounding it is rounding these weights as if they were the dense ones, on the inputs that they get."""
    weight, x = layer(rows=24, columns=128)
    dense = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    method = find_method("default+dense-target")
    stats, plain = Stats.of(x, method.need, dense), Stats.of(x, frozenset({"gram"}))
    pruned = method.prune(weight, stats, parse_pattern("50%").within(method.group))
    ours = codes_for(pruned, weight, stats, grid_of(values))
    wanted = codes_for(pruned, pruned.weight, plain, grid_of(values))
    for one, two in zip(ours, wanted, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "default+refit", "wanda+swap"])
def test_jointly_is_for_admm(name):
    with pytest.raises(BadPattern) as raised:
        with_values(find_method(name), grid_of("int4 by joint"))
    assert str(raised.value) == (
        "Levels and mask are chosen jointly by the methods that are ADMM: alps, default, best. Say 'int4', which "
        "rounds to any method's mask."
    )


def test_ordering_the_sweep_costs_what_a_sweep_costs():
    """Descent is what `act-order` leaves out."""
    default, ordered, swept = (
        rounding_cost(METHODS["default"].cost or Cost(), grid_of(f"int4{by}"))
        for by in ("", " by act-order", " by sweep")
    )
    assert ordered == swept
    assert default.products > swept.products
