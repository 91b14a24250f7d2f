"""The mask of a pruned model, what is written after training it, and that both are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import BadCheckpoint
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.models.stored import checkpoint_tensors


def masks(language_model: LanguageModel) -> dict[str, Tensor]:
    """By the name of every site's parameter that has zeros where it is not zero, bool, of the
    parameter's shape.
    """
    return {
        f"{language_model.block_name(index)}.{name}": kept
        for index, block in enumerate(language_model.blocks)
        for name, kept in block_masks(block).items()
        if not kept.all()
    }


def block_masks(block: nn.Module) -> dict[str, Tensor]:
    """By the name of every site's parameter in a block where it is not zero, bool, of the
    parameter's shape.
    """
    return {
        name: block.get_parameter(name) != 0
        for name in sorted({site.parameter for site in weight_matrices(block).values()})
    }


@torch.no_grad()
def keep_masks(block: nn.Module, before: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Round trained parameters to the dtype they had `before`; one that rounds to zero gets its
    value from before.
    """
    for name, mask in kept.items():
        parameter = block.get_parameter(name)
        parameter.copy_(_rounded(parameter, before.get_parameter(name).to(mask.device), mask))


def _rounded(trained: Tensor, before: Tensor, kept: Tensor) -> Tensor:
    """Trained weights in the dtype of those before; what is kept and would be zero is what it
    was.
    """
    rounded = trained.to(before.dtype)
    return torch.where((rounded == 0) & kept, before, rounded)


@torch.no_grad()
def written(
    language_model: LanguageModel,
    source: Checkpoint,
    kept: Mapping[str, Tensor],
    *,
    only_sites: bool,
) -> Iterator[dict[str, Tensor]]:
    """The trained tensors by checkpoint name, block by block and then the rest, in the dtype they
    are stored in.

    A weight that rounds to zero although it is kept gets its value from before: the mask is the
    mask.
    """
    model, seen = language_model.model, set[str]()
    for index, block in enumerate(language_model.blocks):
        start = language_model.block_name(index)
        names = (
            {site.parameter for site in weight_matrices(block).values()}
            if only_sites
            else set(dict(block.named_parameters()))
        )
        seen |= {f"{start}.{name}" for name, _ in block.named_parameters()}
        yield _stored(
            language_model,
            source,
            {f"{start}.{name}": block.get_parameter(name) for name in sorted(names)},
            kept,
        )
    if not only_sites:
        rest = {name: parameter for name, parameter in model.named_parameters() if name not in seen}
        yield _stored(language_model, source, rest, kept)


def _stored(
    language_model: LanguageModel,
    source: Checkpoint,
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    masked = {
        name: tensor * kept[name] if name in kept else tensor for name, tensor in tensors.items()
    }
    whole = {name: kept[name] for name in tensors if name in kept}
    stored = checkpoint_tensors(language_model, masked, source.places)
    bits = checkpoint_tensors(
        language_model, {name: mask.float() for name, mask in whole.items()}, source.places
    )
    for name, mask in bits.items():
        stored[name] = _rounded(stored[name], source.tensor(name), mask != 0)
    return stored


def refuse_other_masks(
    before: Checkpoint, after: Checkpoint, language_model: LanguageModel
) -> None:
    """Raise BadCheckpoint unless every site of two checkpoints is zero at the same places, weight
    by weight.
    """
    for index, block in enumerate(language_model.blocks):
        start = language_model.block_name(index)
        parameters = {f"{start}.{site.parameter}" for site in weight_matrices(block).values()}
        held = {name: language_model.model.get_parameter(name) for name in sorted(parameters)}
        for name in checkpoint_tensors(language_model, held, before.places):
            if not torch.equal(before.tensor(name) == 0, after.tensor(name) == 0):
                raise BadCheckpoint(
                    f"{name} would have other zeros than before recovery. Nothing was written; report this."
                )
