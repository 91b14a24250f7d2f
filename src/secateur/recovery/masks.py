"""The mask of a pruned model, what is written after training it, and that both are the same."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import BadCheckpoint
from secateur.models.kept import block_masks, matrix_parameters, rounded
from secateur.models.replay import LanguageModel
from secateur.models.source import checkpoint_tensors


def masks(language_model: LanguageModel) -> dict[str, Tensor]:
    """Where the parameters that hold weight matrices with zeros are not zero: bool, by name."""
    return {
        f"{language_model.block_name(index)}.{name}": kept
        for index, block in enumerate(language_model.blocks)
        for name, kept in block_masks(block).items()
        if not kept.all()
    }


@torch.no_grad()
def written(
    language_model: LanguageModel,
    source: Checkpoint,
    kept: Mapping[str, Tensor],
    *,
    only_matrices: bool,
) -> Iterator[dict[str, Tensor]]:
    """The trained tensors by checkpoint name, as stored: block by block, and then the rest.

    A weight that rounds to zero although it is kept gets its value from before.
    """
    in_blocks: set[str] = set()
    for index, block in enumerate(language_model.blocks):
        start = language_model.block_name(index)
        every = dict(sorted(block.named_parameters()))
        in_blocks |= {f"{start}.{name}" for name in every}
        trained = matrix_parameters(block) if only_matrices else every
        tensors = {f"{start}.{name}": parameter for name, parameter in trained.items()}
        yield _stored(language_model, source, tensors, kept)
    if not only_matrices:
        parameters = dict(language_model.model.named_parameters())
        rest = {name: parameters[name] for name in parameters if name not in in_blocks}
        yield _stored(language_model, source, rest, kept)


def _stored(
    language_model: LanguageModel,
    source: Checkpoint,
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    masked = {n: tensor * kept[n] if n in kept else tensor for n, tensor in tensors.items()}
    stored = checkpoint_tensors(language_model, masked, source.places)
    bits = {name: kept[name].float() for name in tensors if name in kept}
    for name, mask in checkpoint_tensors(language_model, bits, source.places).items():
        stored[name] = rounded(stored[name], source.tensor(name), mask != 0)
    return stored


def refuse_other_masks(
    before: Checkpoint, after: Checkpoint, language_model: LanguageModel
) -> None:
    """Raise BadCheckpoint unless two checkpoints have their zeros at the same places."""
    for index, block in enumerate(language_model.blocks):
        start = language_model.block_name(index)
        tensors = {f"{start}.{name}": p for name, p in matrix_parameters(block).items()}
        for name in checkpoint_tensors(language_model, tensors, before.places):
            if not torch.equal(before.tensor(name) == 0, after.tensor(name) == 0):
                raise BadCheckpoint(
                    f"{name} would have other zeros than before recovery. Nothing was written; "
                    "report this."
                )
