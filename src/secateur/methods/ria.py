"""RIA: relative importance and activations (Zhang et al., Plug-and-Play, ICLR 2024, sec. 3).

A weight's share of its row plus its share of its column, times the root mean square of its input to
the power `exponent`: whole channels are protected from being pruned away. Compared over the whole
matrix, as published.
"""

from torch import Tensor

from secateur.methods.base import Method, scored
from secateur.methods.cost import Cost
from secateur.methods.statistics import Stats


def ria(exponent: float = 0.5) -> Method:
    """Relative importance and activations; `exponent` 0 leaves inputs out, 1 is as in Wanda."""

    def score(weight: Tensor, stats: Stats) -> Tensor:
        size = weight.abs()
        of_column, of_row = (size.sum(axis, keepdim=True).clamp_min(1e-30) for axis in (0, 1))
        relative = size / of_column + size / of_row
        return relative * stats.mean("square").sqrt().pow(exponent).to(weight.device)

    return scored({"square"}, "matrix", score, row_wise=False, cost=Cost(matrices=5))
