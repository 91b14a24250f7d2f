"""What a row of a comparison takes, in the smallest format that is written of it: bits a weight of
the matrices, and bytes of the model, scales and masks included.

A plain checkpoint stores all weights, zeros too. Levels of a grid are stored side by side
(compressed-tensors), or in the packed format without those that are zero, behind a bit for each
weight. What a file says of itself is left out; tests hold the figures against files.
"""

from collections.abc import Container
from typing import NamedTuple

from torch import Tensor, nn

from secateur.deployment.packing import LEAST, can_pack
from secateur.kernels.packed import WORD
from secateur.methods.values import Values
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.system.tensors import count_zeros

PLAIN, SIDE_BY_SIDE, PACKED = "safetensors", "compressed-tensors", "packed"


class Size(NamedTuple):
    """`bits` for each weight of the matrices in blocks, and `model_bytes` in all, in a format."""

    bits: float
    model_bytes: int
    stored_as: str


def size_of(
    language_model: LanguageModel,
    plain_bytes: int,
    values: Values | None,
    left_out: Container[str] = (),
) -> Size:
    """The size of a model that takes so many `plain_bytes` of tensors as a plain checkpoint.

    The weight matrices that are `left_out`, by full name, are not on the grid and stay plain.
    """
    named = {
        f"{language_model.block_name(index)}.{name}": matrix.weight
        for index, block in enumerate(language_model.blocks)
        for name, matrix in weight_matrices(block).items()
    }
    weights = sum(weight.numel() for weight in named.values())
    plain = sum(map(plain_bits, named.values()))
    if values is None:
        return Size(plain / weights, plain_bytes, PLAIN)
    kinds = {SIDE_BY_SIDE: side_by_side} | ({PACKED: packed_bits} if can_pack(values) else {})
    sizes = {
        stored_as: sum(
            plain_bits(weight) if name in left_out else bits_of(weight, values)
            for name, weight in named.items()
        )
        for stored_as, bits_of in kinds.items()
    }
    stored_as = min(sizes, key=lambda name: sizes[name])
    bits = sizes[stored_as]
    return Size(bits / weights, plain_bytes + round((bits - plain) / 8), stored_as)


def plain_bits(weight: Tensor) -> int:
    """The bits of a matrix as it is."""
    return 8 * weight.numel() * weight.itemsize


def side_by_side(weight: Tensor, values: Values) -> float:
    """The bits of all levels and scales of a matrix `[out, in]`."""
    return values.grid.bits * weight.numel() + _groups(weight, values) * values.scale_bits


def packed_bits(weight: Tensor, values: Values) -> int:
    """The bits of a mask, of the levels that are not zero, and of scales.

    As packed.c and packed_levels.c have them: levels of four bits or fewer side by side, those of
    every word of the mask from a byte of their own, with scales of bfloat16; those of eight with a
    float32 for each row. A matrix with too few zeros stays plain.
    """
    if count_zeros(weight) < LEAST * weight.numel():
        return plain_bits(weight)
    kept = nn.functional.pad(weight != 0, (0, -weight.shape[1] % WORD))
    words = kept.unflatten(1, (-1, WORD)).sum(2)  # [out, words]
    levels = 8 * int(((values.grid.bits * words + 7) // 8).sum())
    scale = 32 if values.name == "int8" else values.scale_bits
    return kept.numel() + levels + _groups(weight, values) * int(scale)


def _groups(weight: Tensor, values: Values) -> int:
    return len(weight) * values.groups(weight.shape[1])
