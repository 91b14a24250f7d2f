"""ALPS (Meng et al. 2024, algorithm 1, arXiv:2406.07831): ADMM on the pattern, the inverse formed anew every time.

As in the package and unlike the paper, coordinates are normalised before damping, and the penalties are given
and not adapted to the change of the support.
"""

import numpy as np

from .least_squares import normalised
from .masks import zeroed


def alps(w, x, rule, damping, penalties, updates):
    """Return (V [out, in] float64, kept bool) after `updates` steps at each of the `penalties`, without a refit.

    w [out, in], x [tokens, in]; rule(scores) gives the mask, as those of `masks` do.
    """
    t, h, scale = normalised(w, x, damping)

    def project(z):
        return zeroed(z, rule(np.abs(z)))

    sparse, multiplier, free, penalty = project(t), np.zeros_like(t), t, 1.0
    for penalty in penalties:
        for _ in range(updates):
            free = (t @ h - multiplier + penalty * sparse) @ np.linalg.inv(h + penalty * np.eye(len(h)))
            sparse = project(free + multiplier / penalty)
            multiplier = multiplier + penalty * (free - sparse)
    kept = rule(np.abs(free + multiplier / penalty))
    return zeroed(free / scale, kept), kept
