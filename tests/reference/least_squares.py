"""Exact ridge least squares for each row on a fixed mask: the best weights any solver can find for it."""

import numpy as np


def ridged(x, damping):
    """Return H [in, in] float64, the mean over tokens of x x^T with its diagonal times 1 + damping."""
    x = np.asarray(x, dtype=np.float64)
    h = x.T @ x / len(x)
    return h + damping * np.diag(np.diag(h))


def objective(w, v, x, damping):
    """Return what V costs, [out] float64, for w and v [out, in] and x [tokens, in]:

        mean over tokens of ((w - v) x)^2  +  damping * sum_j h_jj (w_j - v_j)^2,   h_jj = mean x_j^2

    The ridge is relative to each input's power and pulls to w.
    """
    change = np.asarray(w, dtype=np.float64) - np.asarray(v, dtype=np.float64)
    return ((change @ ridged(x, damping)) * change).sum(1)


def exact(w, x, kept, damping):
    """Return V [out, in] float64, zero off the mask `kept`, that minimises the `objective` of each row."""
    w, h = np.asarray(w, dtype=np.float64), ridged(x, damping)
    v = np.zeros_like(w)
    for row, keep in enumerate(np.asarray(kept)):
        index = np.flatnonzero(keep)
        v[row, index] = np.linalg.solve(h[np.ix_(index, index)], (w[row] @ h)[index])
    return v


def normalised(w, x, damping):
    """Return (T [out, in], H [in, in], d [in]): T = W d with d_j = sqrt h_jj, and H has the diagonal 1 + damping.

    Every input has to be used by some token.
    """
    h = ridged(x, damping)
    scale = np.sqrt(np.diag(h) / (1 + damping))
    return np.asarray(w, dtype=np.float64) * scale, h / np.outer(scale, scale), scale
