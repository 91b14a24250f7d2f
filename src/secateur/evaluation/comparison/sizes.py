"""What a row of a comparison takes, in the smallest format that is written of it: bits a weight of
the matrices, and bytes of the model, scales and masks included.

A plain checkpoint stores all weights, zeros too. Levels of a grid are stored side by side
(compressed-tensors), or in the packed format without those that are zero, behind a bit for each
weight. What a file says of itself, and padding, are left out; tests hold the figures against files.
"""

from collections.abc import Iterable
from typing import NamedTuple

from secateur.methods.values import Values
from secateur.models.matrices import WeightMatrix, weight_matrices
from secateur.models.replay import LanguageModel
from secateur.system.tensors import count_zeros

PLAIN, SIDE_BY_SIDE, PACKED = "safetensors", "compressed-tensors", "packed"


class Size(NamedTuple):
    """`bits` for each weight of the matrices in blocks, and `model_bytes` in all, in a format."""

    bits: float
    model_bytes: int
    stored_as: str


def size_of(language_model: LanguageModel, plain_bytes: int, values: Values | None) -> Size:
    """The size of a model that takes so many `plain_bytes` of tensors as a plain checkpoint."""
    matrices = [
        matrix for block in language_model.blocks for matrix in weight_matrices(block).values()
    ]
    weights = sum(matrix.stored.numel() for matrix in matrices)
    plain = sum(matrix.stored.nbytes for matrix in matrices)
    if values is None:
        return Size(8 * plain / weights, plain_bytes, PLAIN)
    kinds = {SIDE_BY_SIDE: side_by_side(matrices, values)}
    if packable(values):
        kinds[PACKED] = packed(matrices, values)
    stored_as = min(kinds, key=lambda name: kinds[name])
    bits = kinds[stored_as]
    return Size(bits / weights, round(plain_bytes - plain + bits / 8), stored_as)


def packable(values: Values) -> bool:
    """Whether the packed format holds such values."""
    return values.name.startswith("int") and not values.asymmetric


def side_by_side(matrices: Iterable[WeightMatrix], values: Values) -> float:
    """The bits of all levels and scales."""
    return sum(
        values.grid.bits * matrix.stored.numel() + _scales(matrix, values) for matrix in matrices
    )


def packed(matrices: Iterable[WeightMatrix], values: Values) -> float:
    """The bits of masks, of the levels that are not zero, and of scales."""
    return sum(
        matrix.stored.numel()
        + values.grid.bits * (matrix.stored.numel() - count_zeros(matrix.weight))
        + _scales(matrix, values)
        for matrix in matrices
    )


def _scales(matrix: WeightMatrix, values: Values) -> float:
    rows, columns = matrix.weight.shape
    return rows * values.groups(columns) * values.scale_bits
