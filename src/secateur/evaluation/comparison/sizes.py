"""What a row of a comparison takes, in the smallest format that is written of it: bits a weight of
the matrices, and bytes of the model, scales and masks included.

A plain checkpoint stores all weights, zeros too. Levels of a grid are stored side by side
(compressed-tensors), or in the packed format without those that are zero, behind a bit for each
weight. What a file says of itself is left out; tests hold the figures against files.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from secateur.deployment.packing import can_pack
from secateur.kernels.packed import WORD
from secateur.methods.values import Values
from secateur.models.matrices import WeightMatrix, weight_matrices
from secateur.models.replay import LanguageModel

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
    if can_pack(values):
        kinds[PACKED] = packed(matrices, values)
    stored_as = min(kinds, key=lambda name: kinds[name])
    bits = kinds[stored_as]
    return Size(bits / weights, round(plain_bytes - plain + bits / 8), stored_as)


def side_by_side(matrices: Iterable[WeightMatrix], values: Values) -> float:
    """The bits of all levels and scales."""
    return sum(
        values.grid.bits * matrix.stored.numel() + _groups(matrix, values) * values.scale_bits
        for matrix in matrices
    )


def packed(matrices: Iterable[WeightMatrix], values: Values) -> float:
    """The bits of masks, of the levels that are not zero, and of scales.

    As packed.c has them: levels of four bits or fewer two a byte, those of every word of the mask
    from a byte of their own, with scales of bfloat16; those of eight with a float32 for each row.
    """
    bits = 0
    for matrix in matrices:
        kept = nn.functional.pad(matrix.weight != 0, (0, -matrix.weight.shape[1] % WORD))
        words = kept.unflatten(1, (-1, WORD)).sum(2)  # [out, words]
        if values.name == "int8":
            levels, scale = 8 * int(words.sum()), 32
        else:
            levels, scale = 8 * int(((words + 1) // 2).sum()), 16
        bits += kept.numel() + levels + _groups(matrix, values) * scale
    return bits


def _groups(matrix: WeightMatrix, values: Values) -> int:
    rows, columns = matrix.weight.shape
    return rows * values.groups(columns)
