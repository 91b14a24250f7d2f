"""The oracles against hand-computed cases, closed forms and each other."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch
from support.quantised import NAMES, fixture

from .formats import FORMATS
from .magnitude import magnitude
from .masks import drop_lowest, n_of_m, unstructured, zeroed
from .sparsegpt import gram, prepare, sparsegpt, sparsegpt_by_obs, upper_cholesky
from .wanda import wanda, wanda_scores

BOTH = pytest.mark.parametrize("prune", [sparsegpt, sparsegpt_by_obs])


def weights(rows, columns, seed=0):
    """Return w [rows, columns] float64, normal."""
    return np.random.default_rng(seed).normal(size=(rows, columns))


def inputs(tokens, columns, seed=1):
    """Return x [tokens, columns] float64 with correlated columns of unequal size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, columns)) @ (np.eye(columns) + 0.5 * rng.normal(size=(columns, columns)))
    return mixed * rng.uniform(0.2, 3.0, size=columns)


def is_positive_zero(values):
    """Return whether all values are +0.0."""
    return bool(np.all(values == 0) and not np.any(np.signbit(values)))


# masks


def test_the_lowest_scores_go_and_ties_go_by_position():
    scores = [[3.0, 1.0, 2.0, 1.0], [1.0, 5.0, 0.0, 4.0]]
    assert drop_lowest([3.0, 1.0, 2.0, 1.0], 1).tolist() == [True, False, True, True]
    assert unstructured(scores, 0.5, "row").tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    # the zero, then the 1s at flat positions 1 and 3; the 1 at position 4 stays
    assert unstructured(scores, 0.375, "matrix").tolist() == [
        [True, False, True, False],
        [True, True, False, True],
    ]
    assert n_of_m(scores, 1, 2).tolist() == [[True, False, True, False], [False, True, False, True]]
    assert n_of_m(np.zeros((1, 8)), 1, 4).tolist() == [[False, False, False, True] * 2]
    assert n_of_m(scores, 3, 4).tolist() == [[True, False, True, True], [True, True, False, True]]


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.999, 1])
@pytest.mark.parametrize("scores", [weights(7, 13) ** 2, np.zeros((7, 13)), np.round(weights(7, 13))])
def test_unstructured_counts_are_exact_ties_or_not(ratio, scores):
    assert (~unstructured(scores, ratio, "matrix")).sum() == round(ratio * 91)
    assert (~unstructured(scores, ratio, "row")).sum(axis=1).tolist() == [round(ratio * 13)] * 7


def test_a_count_rounds_half_to_even_and_multiplies_the_integers_first():
    assert [(~unstructured(np.zeros((1, n)), 0.5, "row")).sum() for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert (~unstructured(np.zeros((3, 15)), 0.1, "matrix")).sum() == 4  # 0.1 * 3 * 15 would give 5


@pytest.mark.parametrize(("n", "m"), [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (1, 3), (4, 8)])
@pytest.mark.parametrize("scores", [weights(5, 24) ** 2, np.ones((5, 24))])
def test_n_of_m_keeps_n_in_every_group(n, m, scores):
    assert (n_of_m(scores, n, m).reshape(5, 24 // m, m).sum(axis=2) == n).all()


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="2:4 needs columns in groups of 4; there are 10"):
        n_of_m(np.zeros((2, 10)), 2, 4)
    with pytest.raises(ValueError, match="not 'column'"):
        unstructured(np.zeros((2, 4)), 0.5, "column")
    with pytest.raises(ValueError, match="NaN"):
        unstructured([[1.0, float("nan")]], 0.5, "row")
    with pytest.raises(ValueError, match="cannot drop 3 of 2"):
        drop_lowest([1.0, 2.0], 3)


def test_zeros_are_positive():
    assert is_positive_zero(zeroed(np.array([[-1.0, -0.0]]), np.array([[False, True]])))


# magnitude and wanda


def test_magnitude_by_hand():
    pruned, kept = magnitude([[-3.0, 1.0], [-0.5, 2.0]], lambda scores: unstructured(scores, 0.5, "matrix"))
    assert pruned.tolist() == [[-3.0, 0.0], [0.0, 2.0]]
    assert kept.tolist() == [[True, False], [False, True]]
    assert is_positive_zero(pruned[~kept])


def test_wanda_by_hand():
    # mean squares are 16, 1 and 0, so the scores are 4 * |1|, 1 * |-3| and 0 * |9|
    x = [[4.0, 1.0, 0.0], [-4.0, -1.0, 0.0]]
    assert wanda_scores([[1.0, -3.0, 9.0]], x).tolist() == [[4.0, 3.0, 0.0]]
    pruned, kept = wanda([[1.0, -3.0, 9.0]], x, lambda scores: unstructured(scores, 2 / 3, "row"))
    assert pruned.tolist() == [[1.0, 0.0, 0.0]]
    assert kept.tolist() == [[True, False, False]]


@pytest.mark.parametrize("rule", [lambda s: unstructured(s, 0.6, "row"), lambda s: n_of_m(s, 2, 4)])
def test_wanda_on_identity_activations_is_magnitude(rule):
    w = weights(6, 16)
    by_wanda, by_magnitude = wanda(w, np.eye(16), rule), magnitude(w, rule)
    assert (by_wanda[0] == by_magnitude[0]).all()
    assert (by_wanda[1] == by_magnitude[1]).all()


def test_wanda_is_sparsegpt_s_score_on_a_diagonal_gram_matrix():
    w, size = weights(6, 16), np.linspace(0.1, 4.0, 16)
    _, kept = wanda(w, np.diag(size), lambda s: unstructured(s, 0.5, "row"))
    _, by_sparsegpt = sparsegpt(w, np.diag(size), 0.5, over="row", damping=0.0)
    assert (kept == by_sparsegpt).all()


# sparsegpt: algebra


def test_gram_is_the_mean_of_outer_products():
    assert gram([[1.0, 2.0], [3.0, 0.0]]).tolist() == [[5.0, 1.0], [1.0, 2.0]]
    x = inputs(30, 9)
    np.testing.assert_allclose(gram(x), x.T @ x / 30, rtol=1e-12, atol=1e-12)


def test_the_cholesky_factor_is_upper_and_right():
    h = gram(inputs(40, 12))
    u = upper_cholesky(h)
    assert (np.tril(u, -1) == 0).all()
    assert (np.diag(u) > 0).all()
    np.testing.assert_allclose(u.T @ u, h, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(u, np.linalg.cholesky(h).T, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="not positive definite at column 1"):
        upper_cholesky(np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_the_factor_holds_every_trailing_inverse():
    h = gram(inputs(40, 12))
    u = upper_cholesky(np.linalg.inv(h))
    for j in range(12):
        free = np.linalg.inv(h[j:, j:])
        np.testing.assert_allclose(u[j:, j:].T @ u[j:, j:], free, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(u[j, j] ** 2, free[0, 0], rtol=1e-8)
        np.testing.assert_allclose(u[j, j:] / u[j, j], free[0] / free[0, 0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("over", ["row", "matrix"])
@pytest.mark.parametrize(("ratio", "width"), [(0.5, 128), (0.5, 4), (0.3, 5), (0.8, 1), ((2, 4), 128), ((1, 3), 4)])
def test_both_forms_agree(ratio, width, over, damping):
    w, x = weights(5, 12), inputs(20, 12)
    x[:, 7] = 0.0
    pruned, kept = sparsegpt(w, x, ratio, over, damping, width)
    by_obs, kept_by_obs = sparsegpt_by_obs(w, x, ratio, over, damping, width)
    assert (kept == kept_by_obs).all()
    np.testing.assert_allclose(pruned, by_obs, rtol=1e-9, atol=1e-10)
    assert is_positive_zero(pruned[~kept])
    assert is_positive_zero(by_obs[~kept])


# sparsegpt: hand-computed. For H = [[2, 1], [1, 2]], H^-1 = [[2, -1], [-1, 2]] / 3, so U_00^2 = 2/3 and
# U_11^2 = 1/2 (= 1 / H_11); dropping w_0 adds w_0 / 2 to w_1.
COUPLED = np.array([[2.0, 1.0], [1.0, 2.0]])


@BOTH
def test_two_columns_by_hand(prune):
    # scores 1 / (2/3) = 1.5 and 9 / (1/2) = 18
    pruned, kept = prune([[1.0, 3.0]], COUPLED, 0.5, damping=0.0, is_gram=True)
    assert kept.tolist() == [[False, True]]
    np.testing.assert_allclose(pruned, [[0.0, 3.5]], rtol=1e-14)


@BOTH
def test_the_last_column_has_nobody_to_make_up_for_it(prune):
    pruned, _ = prune([[3.0, 1.0]], COUPLED, 0.5, damping=0.0, is_gram=True)
    assert pruned.tolist() == [[3.0, 0.0]]


@BOTH
def test_a_block_s_mask_is_chosen_at_its_start_on_updated_weights(prune):
    w = [[1.0, 3.0], [4.0, -3.2]]
    # one block: scores 1.5, 18 and 24, 20.48; the two lowest are the first row
    pruned, _ = prune(w, COUPLED, 0.5, damping=0.0, width=2, is_gram=True)
    assert pruned.tolist() == [[0.0, 0.0], [4.0, -3.2]]
    # blocks of one column: w_00 goes and makes w_01 3.5, larger than 3.2
    pruned, _ = prune(w, COUPLED, 0.5, damping=0.0, width=1, is_gram=True)
    np.testing.assert_allclose(pruned, [[0.0, 3.5], [4.0, 0.0]], rtol=1e-14)


@BOTH
@pytest.mark.parametrize("width", [1, 2, 3, 128])
def test_a_group_s_mask_is_chosen_when_the_sweep_reaches_it(prune, width):
    h = np.diag([2.0, 2.0, 2.0, 2.0])
    h[0, 2] = h[2, 0] = 1.0
    # dropping w_0 makes w_2 3.5, larger than 3.2
    pruned, _ = prune([[1.0, 5.0, 3.0, 3.2]], h, (1, 2), damping=0.0, width=width, is_gram=True)
    np.testing.assert_allclose(pruned, [[0.0, 5.0, 3.5, 0.0]], rtol=1e-14)


# sparsegpt: closed forms


@BOTH
@pytest.mark.parametrize("over", ["row", "matrix"])
def test_on_a_diagonal_gram_matrix_nothing_moves_and_the_score_is_w2_h(prune, over):
    w, diagonal = weights(6, 12), np.linspace(0.1, 5.0, 12)
    pruned, kept = prune(w, np.diag(diagonal), 0.4, over, is_gram=True)
    expected = unstructured(w**2 * (diagonal + 0.01 * diagonal.mean()), 0.4, over)
    assert (kept == expected).all()
    assert (pruned == np.where(expected, w, 0.0)).all()


@BOTH
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("column", [0, 3, 7])
def test_dropping_one_column_is_least_squares_on_the_later_ones(prune, column, damping):
    w, x = weights(4, 8), inputs(50, 8)
    w[:, column] *= 1e-4  # so that each row drops this one
    pruned, kept = prune(w, x, 1 / 8, over="row", damping=damping)
    assert (~kept).sum() == 4
    assert not kept[:, column].any()
    # minimise |x (v - w)|^2 / tokens + extra |v - w|^2 over v[later]; v[column] = 0, the rest stays
    extra = damping * (x**2).sum() / 50 / 8
    tall = np.vstack([x, np.sqrt(50 * extra) * np.eye(8)])  # [tokens + in, in]
    later = np.arange(column + 1, 8)
    for i in range(4):
        moved = np.linalg.lstsq(tall[:, later], tall[:, column] * w[i, column], rcond=None)[0]
        expected = w[i].copy()
        expected[column] = 0.0
        expected[later] += moved
        np.testing.assert_allclose(pruned[i], expected, rtol=1e-10, atol=1e-14)
        # and what is lost is the score
        score = w[i, column] ** 2 / np.linalg.inv((tall.T @ tall / 50)[column:, column:])[0, 0]
        np.testing.assert_allclose(((tall @ (pruned[i] - w[i])) ** 2).sum() / 50, score, rtol=1e-8)


@BOTH
@pytest.mark.parametrize("ratio", [0.5, (2, 4)])
def test_the_whole_change_is_made_of_the_rows_of_dropped_columns(prune, ratio):
    # w - pruned = err U, so (w - pruned) U^-1 is the errors: none where a weight stays
    w, x = weights(5, 12), inputs(30, 12)
    pruned, kept = prune(w, x, ratio, width=4)
    _, h, _ = prepare(w, gram(x), 0.01)
    err = (w - pruned) @ np.linalg.inv(upper_cholesky(np.linalg.inv(h)))
    np.testing.assert_allclose(err[kept], 0.0, atol=1e-10)
    # and as U H U^T = 1, their squares add up to the loss
    np.testing.assert_allclose((err**2).sum(), np.trace((w - pruned) @ h @ (w - pruned).T), rtol=1e-9)


@BOTH
def test_the_scale_of_the_gram_matrix_does_not_matter(prune):
    w, h = weights(5, 12), gram(inputs(20, 12))
    for scale in (1e-6, 7.0, 4096.0):
        small = prune(w, h, 0.5, width=4, is_gram=True)
        large = prune(w, scale * h, 0.5, width=4, is_gram=True)
        assert (small[1] == large[1]).all()
        np.testing.assert_allclose(small[0], large[0], rtol=1e-9, atol=1e-12)


def test_the_scale_does_not_matter_either_when_an_input_is_dead():
    w, x = weights(5, 12), inputs(20, 12)
    x[:, 4] = 0.0
    with_one, with_scale = (sparsegpt(w, scale * gram(x), 0.5, is_gram=True)[0] for scale in (1.0, 1e-6))
    np.testing.assert_allclose(with_one, with_scale, atol=1e-9)


# sparsegpt: counts, limits, dead inputs


@pytest.mark.parametrize("ratio", [0, 0.1, 0.35, 0.5, 0.999, 1])
@pytest.mark.parametrize("width", [1, 8, 128])
@pytest.mark.parametrize("ties", [False, True])
def test_sparsegpt_counts_are_exact_in_every_block_and_in_total(ratio, width, ties):
    w, x = weights(3, 20), inputs(40, 20)
    if ties:
        w, x = np.ones((3, 20)), np.eye(20)
    _, by_matrix = sparsegpt(w, x, ratio, "matrix", width=width)
    _, by_row = sparsegpt(w, x, ratio, "row", width=width)
    assert (~by_matrix).sum() == round(ratio * 60)
    assert (~by_row).sum(axis=1).tolist() == [round(ratio * 20)] * 3
    for stop in [*range(width, 20, width), 20]:
        assert (~by_matrix[:, :stop]).sum() == round(ratio * (3 * stop))
        assert (~by_row[:, :stop]).sum(axis=1).tolist() == [round(ratio * stop)] * 3


@BOTH
def test_ties_go_by_position_within_a_block(prune):
    _, kept = prune(np.ones((2, 4)), np.eye(4), 0.5, "matrix", width=2)
    assert kept.tolist() == [[False, False, False, False], [True, True, True, True]]
    _, kept = prune(np.ones((2, 4)), np.eye(4), (1, 2))
    assert kept.tolist() == [[False, True, False, True]] * 2


@BOTH
def test_dropping_nothing_changes_nothing_and_dropping_all_leaves_zeros(prune):
    w, x = weights(4, 8), inputs(20, 8)
    pruned, kept = prune(w, x, 0)
    assert kept.all()
    assert (pruned == w).all()
    pruned, kept = prune(w, x, 0.999)
    assert not kept.any()
    assert is_positive_zero(pruned)


@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 128), (1, 4, 6), (3, 4, 2), (1, 3, 128), (4, 8, 12)])
def test_sparsegpt_keeps_n_in_every_group_whatever_the_width(n, m, width):
    w, x = weights(3, 24), inputs(40, 24)
    pruned, kept = sparsegpt(w, x, (n, m), width=width)
    assert (kept.reshape(3, 24 // m, m).sum(axis=2) == n).all()
    assert (pruned == sparsegpt(w, x, (n, m), width=5)[0]).all()
    with pytest.raises(ValueError, match=f"{n}:{m} needs columns in groups of {m}; there are 26"):
        sparsegpt(weights(3, 26), inputs(40, 26), (n, m))


def test_dead_inputs_take_the_mean_of_the_live_ones():
    w, h, alive = prepare([[5.0, 7.0]], [[3.0, 0.0], [0.0, 0.0]], damping=0.01)
    assert w.tolist() == [[5.0, 7.0]]
    assert alive == [True, False]
    np.testing.assert_allclose(h, [[3.03, 0.0], [0.0, 3.03]], rtol=1e-15)


@BOTH
def test_dead_inputs_go_first_and_move_nothing(prune):
    w, x = weights(4, 8), inputs(30, 8)
    x[:, [2, 5]] = 0.0
    original = w.copy()
    pruned, kept = prune(w, x, 0.25, "row")
    assert kept.tolist() == [[True, True, False, True, True, False, True, True]] * 4
    assert (pruned[kept] == original[kept]).all()
    assert (w == original).all()
    # fewer to drop than dead: what the pattern does not take stays as it was
    pruned, kept = prune(w, x, 0.125, "row")
    assert not kept[:, 2].any()
    assert kept[:, 5].all()
    assert (pruned[:, 5] == original[:, 5]).all()


def test_when_every_input_is_dead_only_the_asked_share_goes():
    w = weights(3, 4)
    pruned, kept = sparsegpt(w, np.zeros((5, 4)), 0.5)
    assert (~kept).sum() == 6
    assert (pruned[kept] == w[kept]).all()


def test_a_singular_gram_matrix_without_damping_is_an_error():
    with pytest.raises((ValueError, np.linalg.LinAlgError)):
        sparsegpt(weights(2, 3), np.ones((5, 3)), 0.5, damping=0.0)


def test_it_is_quick_enough_at_the_largest_size_in_use():
    pruned, kept = sparsegpt(weights(64, 256), inputs(300, 256), 0.5)
    assert (~kept).sum() == 8192
    assert np.isfinite(pruned).all()


# quantised weights


@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_are_those_of_the_library_that_packed_them(name):
    made = fixture(name)
    settings = next(iter(made.config.values()))
    for group in settings.get("config_groups", {}).values():
        settings = group["weights"]
    for module, parts in made.parts.items():
        said = json.loads(made.described.get(module, "{}"))
        weight = FORMATS[name.split("-")[0]](parts, settings | said).contiguous()
        digest = sha256(weight.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert (str(weight.dtype).removeprefix("torch."), digest) == made.digests[module]
