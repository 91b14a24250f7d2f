"""Conjugate gradients for the weights on a mask, as textbooks have them: row by row, on the kept inputs alone."""

import numpy as np

from .least_squares import normalised


def refit(w, x, kept, start, damping, iterations):
    """Return V [out, in] float64, zero off the mask `kept`, after some iterations from `start` [out, in].

    The least-squares problem is that of `least_squares.exact`, in normalised coordinates, where it is better
    conditioned: as many iterations elsewhere give other weights.
    """
    t, h, scale = normalised(w, x, damping)
    v = np.zeros_like(t)
    for row, keep in enumerate(np.asarray(kept)):
        index = np.flatnonzero(keep)
        a, b = h[np.ix_(index, index)], (t[row] @ h)[index]
        solution = np.asarray(start, dtype=np.float64)[row, index] * scale[index]
        residual = b - a @ solution
        direction = residual
        for _ in range(iterations):
            step = residual @ residual / (direction @ a @ direction)
            solution = solution + step * direction
            before, residual = residual, residual - step * a @ direction
            direction = residual + residual @ residual / (before @ before) * direction
        v[row, index] = solution / scale[index]
    return v
