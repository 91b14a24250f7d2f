"""Magnitude pruning: the smallest weights go (Han et al. 2015, arXiv:1506.02626). Needs no data.

Compared over the whole matrix, as the baseline of the Wanda and SparseGPT papers is. Unlike their
code, which removes everything `<=` the threshold, the count is exact when weights are tied.
"""

from secateur.methods.base import scored
from secateur.methods.cost import Cost

magnitude = scored((), "matrix", lambda weight, stats: weight.abs(), cost=Cost())
