"""SparseGPT (Frantar & Alistarh 2023, algorithm 1, arXiv:2301.00774), one column at a time, nothing deferred.

Dropping w_j and letting only the later columns answer costs w_j^2 / P_00, and moves them by
-(w_j / P_00) P_0k, with P = (H[j:, j:])^-1, H the Gram matrix of the inputs: optimal brain surgeon on the
columns that are still free. Two versions are here:

* `sparsegpt_by_obs` inverts H[j:, j:] afresh for every j, exactly as above: O(in^4), tiny matrices only.
* `sparsegpt` reads all of them off one factor, as the paper does. Let H^-1 = U^T U, U upper triangular, and
  split at j: H^-1 = [[A, B], [B^T, D]], A being j x j. Then (H[j:, j:])^-1 is the Schur complement
  D - B^T A^-1 B (block inversion), which is also what U^T U leaves when its first j rows are taken away:
  U[j:, j:]^T U[j:, j:]. Its first row is U_jj * U[j, j:], hence P_00 = U_jj^2 and P_0k / P_00 = U_jk / U_jj:
  score w_j^2 / U_jj^2, update -(w_j / U_jj) U_jk.

Departures from the authors' code: counts are exact (its `<=` a threshold drops one more and all ties), N:M
keeps N (its `prunen` drops N), groups never straddle a block edge, H is a mean over tokens, and inputs that
no token uses are left alone (see `prepare`).
"""

import numpy as np

from .masks import drop_lowest, zeroed


def gram(x):
    """Return the mean over tokens of x x^T, [in, in] float64, for x [tokens, in]."""
    x = np.asarray(x, dtype=np.float64)
    total = np.zeros((x.shape[1], x.shape[1]))
    for token in x:
        total += np.outer(token, token)
    return total / len(x)


def prepare(w, h, damping):
    """Return (w, h, alive): float64 copies, h damped, and which inputs any token uses.

    A dead input has h_jj == 0. The authors set it to 1, zero its weights, and let those ones into the mean
    behind the damping, which makes the result depend on the scale of H. Here the mean is over the live inputs,
    dead ones get that mean as their h_jj, and their weights score 0 but are otherwise left alone.
    """
    w = np.array(w, dtype=np.float64)
    h = np.array(h, dtype=np.float64)
    columns = len(h)
    alive = [h[j, j] > 0 for j in range(columns)]
    live = [h[j, j] for j in range(columns) if alive[j]]
    mean = sum(live) / len(live) if live else 1.0
    for j in range(columns):
        h[j, j] = (h[j, j] if alive[j] else mean) + damping * mean
    return w, h, alive


def upper_cholesky(matrix):
    """Return U, upper triangular, with U^T U = matrix [n, n]; ValueError if that is not positive definite."""
    n = len(matrix)
    u = np.zeros((n, n))
    for j in range(n):
        pivot = matrix[j, j] - sum(u[k, j] ** 2 for k in range(j))
        if not pivot > 0:
            raise ValueError(f"not positive definite at column {j}: pivot {pivot}")
        u[j, j] = pivot**0.5
        for i in range(j + 1, n):
            u[j, i] = (matrix[j, i] - u[:j, j] @ u[:j, i]) / u[j, j]
    return u


def spans(columns, ratio, width):
    """Return the list of (start, stop) of columns whose mask is chosen together, when the sweep is at start.

    Unstructured: blocks of `width`, the last one shorter. (n, m): groups of m. Blocks are then widened or
    narrowed to a multiple of m, so that no group straddles an edge; as nothing here is deferred to a
    block's end, they have no other effect, and `width` does not matter.
    """
    step = ratio[1] if isinstance(ratio, tuple) else width
    if isinstance(ratio, tuple) and columns % step:
        raise ValueError(f"{ratio[0]}:{step} needs columns in groups of {step}; there are {columns}")
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def choose(scores, ratio, over, start, stop):
    """Return kept [rows, stop - start] bool for the scores of columns start..stop.

    Counts are differences of rounded running totals, so that the blocks add up to round(ratio * n) exactly.
    """
    rows = len(scores)
    if isinstance(ratio, tuple):
        n, m = ratio
        return np.array([drop_lowest(row, m - n) for row in scores])
    if over == "matrix":
        return drop_lowest(scores, round(ratio * (rows * stop)) - round(ratio * (rows * start)))
    if over == "row":
        return np.array([drop_lowest(row, round(ratio * stop) - round(ratio * start)) for row in scores])
    raise ValueError(f"over is 'row' or 'matrix', not {over!r}")


def sparsegpt(w, x_or_gram, ratio, over="matrix", damping=0.01, width=128, is_gram=False):
    """Return (pruned w, kept), [out, in] float64 and bool.

    w [out, in]; x_or_gram is x [tokens, in], or the Gram matrix [in, in] with is_gram=True (a flag, because
    x may be square). `ratio` is the share dropped, or (n, m) to keep n of every m; `over`, 'matrix' or
    'row', is where the share is counted within a block of `width` columns, and says nothing about (n, m).

    The scale of H does not matter: h -> c h takes its damping along, so u -> u / sqrt(c), which multiplies
    every score by c, and leaves (w_ij / u_jj) u_jk as it was.
    """
    w, h, alive = prepare(w, x_or_gram if is_gram else gram(x_or_gram), damping)
    rows, columns = w.shape
    u = upper_cholesky(np.linalg.inv(h))
    kept = np.ones((rows, columns), dtype=bool)
    for start, stop in spans(columns, ratio, width):
        scores = np.array([[alive[j] * w[i, j] ** 2 / u[j, j] ** 2 for j in range(start, stop)] for i in range(rows)])
        kept[:, start:stop] = choose(scores, ratio, over, start, stop)
        for j in range(start, stop):
            q = np.where(kept[:, j], w[:, j], 0.0)
            err = (w[:, j] - q) / u[j, j]
            for k in range(j + 1, columns):
                w[:, k] -= err * u[j, k]
    return zeroed(w, kept), kept


def sparsegpt_by_obs(w, x_or_gram, ratio, over="matrix", damping=0.01, width=128, is_gram=False):
    """Return what `sparsegpt` returns, from the optimal-brain-surgeon formulas alone: no factor is formed.

    Arguments as there. Every score and every step inverts the Gram matrix of the columns still free.
    """
    w, h, alive = prepare(w, x_or_gram if is_gram else gram(x_or_gram), damping)
    rows, columns = w.shape
    kept = np.ones((rows, columns), dtype=bool)
    for start, stop in spans(columns, ratio, width):
        scores = np.zeros((rows, stop - start))
        for j in range(start, stop):
            free = np.linalg.inv(h[j:, j:])  # [in - j, in - j]
            scores[:, j - start] = alive[j] * w[:, j] ** 2 / free[0, 0]
        kept[:, start:stop] = choose(scores, ratio, over, start, stop)
        for j in range(start, stop):
            free = np.linalg.inv(h[j:, j:])
            for i in range(rows):
                if not kept[i, j]:
                    w[i, j:] -= w[i, j] / free[0, 0] * free[0]
    return zeroed(w, kept), kept
