"""Exact ridge least squares for each row on a fixed mask: the best weights any solver can find for it."""

import numpy as np


def exact(w, x, kept, damping):
    """Return V [out, in] float64, zero off the mask `kept`, that minimises each row's

        mean over tokens of ((w - v) x)^2  +  damping * sum_j h_jj (w_j - v_j)^2,   h_jj = mean x_j^2

    for w [out, in] and x [tokens, in]: the ridge is relative to each input's power and pulls to w.
    """
    w, x = np.asarray(w, dtype=np.float64), np.asarray(x, dtype=np.float64)
    h = x.T @ x / len(x)
    h = h + damping * np.diag(np.diag(h))
    v = np.zeros_like(w)
    for row, keep in enumerate(np.asarray(kept)):
        index = np.flatnonzero(keep)
        v[row, index] = np.linalg.solve(h[np.ix_(index, index)], (w[row] @ h)[index])
    return v
