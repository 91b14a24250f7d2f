"""Rounding to grids, slow and plain, in float64: lists of levels, inverses from scratch, every level tried."""

import numpy as np

LEVELS = {
    **{f"int{bits}": np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=float) for bits in (2, 3, 4, 8)},
    **dict.fromkeys(("nvfp4", "mxfp4"), np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])),
}
"""All levels of a grid by name."""


def nearest(ratio, levels):
    """The level nearest to a number; of two, the one that the other's neighbours make even."""
    distance = np.abs(levels - ratio)
    return levels[np.argmin(distance)]


def loss(weight, target_weight, gram):
    """(w − t) H (w − t)ᵀ of every row."""
    off = weight - target_weight
    return np.einsum("ri,ij,rj->r", off, gram, off)


def best_scale(weight, importance, scales, levels):
    """Which scale rounds a group of weights with the least sum of importance · error²."""
    losses = []
    for scale in scales:
        rounded = np.array([nearest(w / scale, levels) * scale for w in weight])
        losses.append((importance * (rounded - weight) ** 2).sum())
    return int(np.argmin(losses))


def gptq(weight, gram, units, levels):
    """Optimal brain quantisation from the first column to the last: each rounding is answered by all later weights,
    with the inverse of what is still free (Frantar et al. 2023, arXiv:2210.17323, eq. 2). units 0: rounded to 0.
    """
    weight = weight.copy()
    for j in range(weight.shape[1]):
        inverse = np.linalg.inv(gram[j:, j:])
        for row in range(len(weight)):
            unit = units[row, j]
            rounded = nearest(weight[row, j] / unit, levels) * unit if unit else 0.0
            error = weight[row, j] - rounded
            weight[row, j:] -= error * inverse[0] / inverse[0, 0]
            weight[row, j] = rounded
    return weight


def descent(weight, gram, target, units, levels):
    """One pass over the columns: of all levels the one of least ½ x H xᵀ − b xᵀ, while the other weights stand."""
    weight = weight.copy()
    for row in range(len(weight)):
        for j in range(weight.shape[1]):
            if not units[row, j]:
                continue
            tried = np.repeat(weight[row][None], len(levels), 0)
            tried[:, j] = levels * units[row, j]
            objective = 0.5 * np.einsum("ki,ij,kj->k", tried, gram, tried) - tried @ target[row]
            weight[row] = tried[np.argmin(objective)]
    return weight


def fitted_scale(weight, gram, target, group):
    """What the weights of a `group` (a slice) of one row are best multiplied by: the vertex of a parabola, from three
    of its points.
    """

    def objective(factor):
        changed = weight.copy()
        changed[group] *= factor
        return 0.5 * changed @ gram @ changed - changed @ target

    low, middle, high = objective(0.0), objective(1.0), objective(2.0)
    curvature = low - 2 * middle + high
    return 1.0 if curvature <= 0 else 1 - (high - low) / 2 / curvature
