"""Which matrix of an exported model is which of the checkpoint that it was made of: by its numbers.

Exporters name constants as they like ("val_58"), and quantisers change every number, but a matrix
still looks like the one that it was: the cosine between two of one shape that belong together is
near one (0.9 in two bits), and near zero between others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.quantised.base import DenseTensor
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, decoded_checkpoint
from secateur.checkpoints.quantised.unpack import decoded_pieces
from secateur.errors import BadCheckpoint
from secateur.models.stored import Stored

ROWS, NUMBERS = 256, 4096
"""Of a matrix, the first so many rows are looked at, and of these so many numbers."""
LEAST = 0.5
"""The cosine from which two matrices belong together."""


def named_after(
    exported: DecodedCheckpoint, pruned: Checkpoint
) -> tuple[DecodedCheckpoint, dict[str, Stored]]:
    """The exported matrices under the names of the pruned ones, and lying as these do.

    Each of the pruned is given once. Raises BadCheckpoint where one is like none of them.
    """
    samples = dict[tuple[str, bool], Tensor]()
    stored = dict[str, Stored]()
    tensors: list[DenseTensor] = []
    for tensor in exported.source.tensors:
        own, likest = _sample(next(decoded_pieces(tensor))), (LEAST, "", False)
        for name, turned in _of_its_shape(tensor.shape, pruned):
            if name not in stored:
                if (name, turned) not in samples:
                    weight = pruned.tensor(name)
                    samples[name, turned] = _sample(weight.mT if turned else weight)
                likeness = float(own @ samples[name, turned])
                likest = max(likest, (likeness, name, turned))
        _, name, turned = likest
        if not name:
            raise BadCheckpoint(
                f"{tensor.name} {list(tensor.shape)} of {exported.folder} cannot be held against "
                f"{pruned.folder}, which has no matrix like it. Name the checkpoint that it was "
                "made of."
            )
        stored[name] = Stored(name, turned, expert=False)
        tensors.append(_as_it_lies(tensor, name) if turned else replace(tensor, name=name))
    return decoded_checkpoint(replace(exported.source, tensors=tuple(tensors))), stored


def _of_its_shape(shape: tuple[int, ...], pruned: Checkpoint) -> Iterator[tuple[str, bool]]:
    """The tensors of a checkpoint that have a shape, and those that have it when turned."""
    other = (*shape[:-2], *shape[:-3:-1])
    for name, place in pruned.places.items():
        if place.shape == shape:
            yield name, False
        if place.shape == other:
            yield name, True


def _sample(matrix: Tensor) -> Tensor:
    """Some numbers of a matrix `[…, out, in]`, float32, of length one; of several the first."""
    while matrix.ndim > 2:
        matrix = matrix[0]
    numbers = matrix[:ROWS].flatten()
    step = max(numbers.numel() // NUMBERS, 1) | 1  # even steps would meet one place of each four
    return torch.nn.functional.normalize(numbers[::step].float(), dim=0)


def _as_it_lies(tensor: DenseTensor, name: str) -> DenseTensor:
    """A matrix `[in, out]` of one that is read as `[out, in]`."""
    shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1])
    return replace(tensor, name=name, shape=shape, read=partial(_turned, tensor), pieces=None)


def _turned(tensor: DenseTensor) -> Tensor:
    return tensor.read().mT
