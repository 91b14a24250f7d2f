"""95 % intervals by the bootstrap: how far an estimate would have moved with other data like these.

Percentile intervals (Efron & Tibshirani 1993, ch. 13). Seeds are fixed: same data, same interval.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
AT_ONCE = 100
"""Resamples that are in memory together."""


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], Floats], count: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of a statistic of `count` observations, resampled with replacement.

    `statistic` gets the indices of `AT_ONCE` resamples `[resamples, count]` and returns one value
    of each. Where it looks up several lists with the same indices, pairs stay together: what makes
    an observation odd for both cancels in their difference.
    """
    draw = np.random.default_rng(0)
    indices = (draw.integers(count, size=(AT_ONCE, count)) for _ in range(resamples // AT_ONCE))
    return percentile_interval(np.concatenate([statistic(each) for each in indices]))


def resampled_means(values: Floats, name: str) -> Floats:
    """The means of 10,000 resamples of few different values, drawn as multinomial counts.

    The seed is the name: a list's resamples do not depend on the lists beside it.
    """
    different, counts = np.unique(values, return_counts=True)
    draw = np.random.default_rng(list(name.encode()))
    return draw.multinomial(len(values), counts / len(values), RESAMPLES) @ different / len(values)


def percentile_interval(estimates: Floats) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of an estimate's resamples."""
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)
