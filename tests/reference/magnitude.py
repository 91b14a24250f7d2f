"""Magnitude pruning: the smallest weights go, whatever their inputs (Han et al. 2015, arXiv:1506.02626)."""

import numpy as np

from .masks import zeroed


def magnitude(w, mask_rule):
    """Return (pruned w, kept), [out, in] float64 and bool, by score |w|.

    `mask_rule` maps scores to kept, e.g. lambda scores: n_of_m(scores, 2, 4).
    """
    w = np.asarray(w, dtype=np.float64)
    kept = mask_rule(np.abs(w))
    return zeroed(w, kept), kept
