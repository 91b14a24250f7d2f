"""Wanda: weights times the size of their inputs, no update (Sun et al. 2024, eq. 1, arXiv:2306.11695)."""

import numpy as np

from .masks import zeroed


def wanda_scores(w, x):
    """Return scores [out, in] float64: |w_ij| * sqrt(mean over tokens of x_tj^2).

    w [out, in]; x [tokens, in]. The paper has the norm over tokens, the square root of a sum: one common
    factor sqrt(tokens) on all scores, which moves no comparison.
    """
    w = np.asarray(w, dtype=np.float64)
    x = np.asarray(x, dtype=np.float64)
    tokens, columns = x.shape
    scores = np.zeros_like(w)
    for j in range(columns):
        mean_square = sum(float(value) ** 2 for value in x[:, j]) / tokens
        for i in range(len(w)):
            scores[i, j] = abs(w[i, j]) * mean_square**0.5
    return scores


def wanda(w, x, mask_rule):
    """Return (pruned w, kept), [out, in] float64 and bool; `mask_rule` maps scores to kept.

    The paper compares within a row: lambda scores: unstructured(scores, ratio, 'row').
    """
    kept = mask_rule(wanda_scores(w, x))
    return zeroed(np.asarray(w, dtype=np.float64), kept), kept
