"""Masks made better by exchanges (SparseSwaps 2025): every exchange is tried, the best one made, until none helps."""

import itertools

import numpy as np

from .least_squares import normalised


def swap(w, x, kept, groups, damping):
    """Return kept [out, in] bool: the mask `kept` after the best exchanges of each row.

    w [out, in], x [tokens, in]. A weight that stays and one that does not change places within one of the
    `groups`, lists of columns. What an exchange is worth is the row's error when its removed part u is lost: u H u^T.
    """
    t, h, _ = normalised(w, x, damping)
    kept = np.array(kept)
    for row, mask in zip(t, kept, strict=True):

        def cost(trial, row=row):
            removed = np.where(trial, 0.0, row)
            return removed @ h @ removed

        while True:
            trials = []
            for group in groups:
                for out, back in itertools.product(group, group):
                    if mask[out] and not mask[back]:
                        trial = mask.copy()
                        trial[out], trial[back] = False, True
                        trials.append((cost(trial), out, back))
            least, out, back = min(trials)
            if least >= cost(mask) - 1e-9:
                break
            mask[out], mask[back] = False, True  # a view: changes `kept`
    return kept
