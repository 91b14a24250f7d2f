"""RIA: relative importance and activations, no update (Zhang et al., Plug-and-Play, ICLR 2024, eq. 4)."""

import numpy as np

from .masks import zeroed


def ria_scores(w, x, exponent=0.5):
    """Return scores [out, in] float64: (|w_ij| / its column's sum + |w_ij| / its row's sum) * rms(x_j)^exponent.

    w [out, in]; x [tokens, in]. The paper has the norm over tokens; the common factor moves no comparison.
    """
    w = np.abs(np.asarray(w, dtype=np.float64))
    x = np.asarray(x, dtype=np.float64)
    scores = np.zeros_like(w)
    for i in range(len(w)):
        for j in range(w.shape[1]):
            share = w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()
            scores[i, j] = share * np.mean(x[:, j] ** 2) ** (exponent / 2)
    return scores


def ria(w, x, mask_rule):
    """Return (pruned w, kept), [out, in] float64 and bool; `mask_rule` maps scores to kept."""
    kept = mask_rule(ria_scores(w, x))
    return zeroed(np.asarray(w, dtype=np.float64), kept), kept
