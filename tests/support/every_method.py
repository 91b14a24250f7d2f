"""The checks that every method passes, whatever it computes; and a layer to prune."""

import pytest
import torch
from reference.least_squares import exact, objective
from reference.masks import n_of_m, unstructured

from secateur.methods import find_method
from secateur.methods.least_squares import ridge
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import NM, Pattern, Unstructured
from secateur.methods.statistics import STATS, Stats
from secateur.methods.together import prune_together

PATTERNS = ["0%", "50%", "30% of row", "61.8% of matrix", "99%", "2:4", "4:8", "1:3", "3:4"]
ROWS, COLUMNS = 24, 264  # divisible by 2, 3, 4, 8, and more than two blocks of 128 columns


def layer(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, tokens: int = 900):
    """A weight and correlated inputs of unequal scale, float32."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    scale = torch.randn(columns, generator=draw).exp()
    return weight, torch.randn(tokens, columns, generator=draw) @ mix * scale


def mask_rule(pattern: Pattern):
    """The reference's rule for a pattern."""
    if isinstance(pattern, NM):
        return lambda scores: n_of_m(scores, pattern.n, pattern.m)
    assert isinstance(pattern, Unstructured)
    return lambda scores: unstructured(scores, pattern.ratio, pattern.over)


def run(name: str, pattern: str, weight: torch.Tensor, x: torch.Tensor):
    method = find_method(name)
    return method.prune(weight, Stats.of(x, method.need), parse_pattern(pattern).within(method.group))


def outputs(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[tokens, out]`, in float64."""
    return x.double() @ weight.double().T


class EveryMethod:
    """Tests of one method and one pattern, by name; pytest collects the subclasses that give those."""

    def test_counts_are_exact_and_zeros_positive(self, name, pattern):
        weight, x = layer()
        pruned = run(name, pattern, weight, x)
        resolved = parse_pattern(pattern).within(find_method(name).group)
        assert (pruned.weight[~pruned.kept] == 0).all()
        assert not pruned.weight[~pruned.kept].signbit().any()
        if isinstance(resolved, NM):
            assert (pruned.kept.unflatten(1, (-1, resolved.m)).sum(-1) == resolved.n).all()
            return
        assert isinstance(resolved, Unstructured)
        if resolved.over == "matrix":
            assert (~pruned.kept).sum() == round(resolved.ratio * weight.numel())
        else:
            assert ((~pruned.kept).sum(1) == round(resolved.ratio * COLUMNS)).all()

    def test_types_shapes_and_inputs_left_alone(self, name, pattern):
        weight, x = layer()
        before, stats = weight.clone(), Stats.of(x, find_method(name).need)
        sums = {key: value.clone() for key, value in stats.sums.items()}
        pruned = find_method(name).prune(weight, stats, parse_pattern(pattern).within(find_method(name).group))
        assert pruned.weight.dtype == torch.float32
        assert pruned.kept.dtype == torch.bool
        assert pruned.weight.shape == pruned.kept.shape == weight.shape
        assert torch.equal(weight, before)
        assert all(torch.equal(stats.sums[key], sums[key]) for key in sums)
        assert find_method(name).need <= STATS.keys()

    def test_the_same_twice(self, name, pattern):
        weight, x = layer()
        first, second = run(name, pattern, weight, x), run(name, pattern, weight.clone(), x.clone())
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.kept, second.kept)

    def test_its_own_output_is_left_as_it_is(self, name, pattern):
        weight, x = layer()
        once = run(name, pattern, weight, x)
        twice = run(name, pattern, once.weight, x)
        assert torch.equal(once.kept, twice.kept) or not find_method(name).updates
        if find_method(name).updates:  # solved again in float32
            assert (once.weight - twice.weight).norm() <= 1e-3 * once.weight.norm()
        else:
            assert torch.equal(once.weight, twice.weight)

    def test_a_transposed_view_gives_the_same(self, name, pattern):
        weight, x = layer()
        stored = weight.T.contiguous()  # as Conv1D stores it
        before = stored.clone()
        transposed = run(name, pattern, stored.T, x)
        assert torch.equal(stored, before)
        assert torch.equal(run(name, pattern, weight, x).kept, transposed.kept)

    def test_statistics_merged_from_uneven_parts_give_the_same(self, name, pattern):
        """Sums in another order differ by 2e-6 of themselves at most. Divided by the ridge (0.09 here), which bounds
        what a solution answers to that, and taken 40 times by the longest iteration, that is 1e-3 of the output."""
        weight, x = layer()
        method = find_method(name)
        whole = Stats.of(x, method.need)
        parts = [Stats.of(part, method.need) for part in x.split([1, 500, 100, 299])]
        merged = sum(parts[1:], parts[0])
        assert merged.tokens == whole.tokens
        resolved = parse_pattern(pattern).within(method.group)
        first, second = method.prune(weight, whole, resolved), method.prune(weight, merged, resolved)
        assert (first.kept != second.kept).float().mean() <= 0.0005
        same = (first.kept == second.kept).all(1)  # a row depends on the others through the mask alone
        assert same.float().mean() >= 0.8
        output = outputs(weight, x).norm(dim=0)
        assert (outputs(first.weight - second.weight, x).norm(dim=0) <= 1e-3 * output)[same].all()
        errors = [outputs(weight - pruned.weight, x).norm() for pruned in (first, second)]
        assert abs(errors[0] - errors[1]) <= 1e-3 * errors[0] + 1e-6 * output.norm()

    def test_weights_cost_what_dense_ones_cost_at_most_and_the_best_ones_at_least(self, name, pattern):
        """On the mask that the method chose, against exact least squares in float64; `+refit` comes within 1 %."""
        weight, x = layer()
        pruned = run(name, pattern, weight, x)
        w, inputs, kept, damping = weight.numpy(), x.numpy(), pruned.kept.numpy(), ridge(Stats.of(x, {"gram"}))
        best, reached, dense, everything = (
            objective(w, v, inputs, damping).sum()
            for v in (exact(w, inputs, kept, damping), pruned.weight.numpy(), w * kept, 0)
        )
        rounding = 1e-10 * everything  # (100 steps of float32)²
        assert best - rounding <= reached <= dense + rounding
        if name.endswith("+refit"):
            assert reached <= 1.01 * best + rounding

    def test_matrices_solved_together_are_what_they_are_alone(self, name, pattern):
        """q, k and v read one input: stacking them shares the factorisation, and must change nothing else."""
        method = find_method(name)
        # Eight rows alone may be multiplied by another kernel than eighty, and many steps amplify its rounding.
        weights = [layer(seed, rows)[0] for seed, rows in enumerate([24, 16, 40, 32])]
        x = layer()[1]
        stats = Stats.of(x, method.need | {"gram"})
        others = [pattern] * 3 if ":" in pattern else ["40%", "70% of row", "20% of matrix"]
        patterns = [parse_pattern(text) for text in (pattern, *others)]
        together = prune_together(method, weights, stats, patterns)
        for weight, own, found in zip(weights, patterns, together, strict=True):
            alone = method.prune(weight, stats, own.within(method.group))
            assert (found.kept != alone.kept).float().mean() <= 0.001
            assert found.kept.sum() == alone.kept.sum()
            if method.updates:
                first, second = ((p.weight - weight) @ x.T for p in (found, alone))
                assert first.norm() == pytest.approx(second.norm().item(), rel=1e-3, abs=1e-3)
            same = (found.kept == alone.kept).all(1)
            assert same.float().mean() >= 0.8
            assert torch.allclose(found.weight[same], alone.weight[same], rtol=1e-3, atol=1e-3)
