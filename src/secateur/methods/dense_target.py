"""`+dense-target`: aim at what the dense model computes, not at the dense weights.

With x the inputs that the pruned prefix gives and x_dense those of the same tokens in the dense
model, a solver that is given B = W E[x_dense xᵀ] makes up for the error of the matrices before
(FISTAPruner, arXiv:2408.03728, does so inside a block). It takes `sequential` along: else q, k, v
and down of one block would each make up for the whole error of the blocks before, and together they
do too much.
"""

from secateur.errors import UnknownName
from secateur.methods.base import Method


def dense_target(method: Method) -> Method:
    """The method aiming at the dense model's outputs. Raises UnknownName if it solves nothing."""
    if "gram" not in method.need:
        raise UnknownName(
            "refinement 'dense-target' after a method that solves nothing",
            "dense-target",
            ("refit",),
        )
    return method._replace(need=method.need | {"cross"}, sequential=True)
