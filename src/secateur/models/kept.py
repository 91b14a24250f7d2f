"""Which weights of a block are kept, and that they stay so when it is stored."""

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur.models.matrices import weight_matrices


def block_masks(block: nn.Module) -> dict[str, Tensor]:
    """Where the parameters of a block that hold weight matrices are not zero, bool, by name."""
    return {name: parameter != 0 for name, parameter in matrix_parameters(block).items()}


def matrix_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a block that hold weight matrices, by name; experts share theirs."""
    names = sorted({matrix.parameter for matrix in weight_matrices(block).values()})
    return {name: block.get_parameter(name) for name in names}


def kept_of(block: nn.Module, names: Iterable[str], pruned: Container[str]) -> dict[str, Tensor]:
    """Where parameters of a block are not zero, without the experts that were not `pruned`."""
    kept = {name: block.get_parameter(name) != 0 for name in names}
    for matrix in weight_matrices(block).values():
        if matrix.expert and matrix.parameter in kept and matrix.name not in pruned:
            kept[matrix.parameter][int(matrix.name.rsplit(".", 2)[1])] = False
    return kept


@torch.no_grad()
def keep_masks(
    block: nn.Module, before: nn.Module, kept: Mapping[str, Tensor], grids: Container[str] = ()
) -> None:
    """Round trained parameters to the dtype they had `before`; none that is `kept` becomes zero,
    but on one of the `grids`, which have a level for it.
    """
    for name, mask in kept.items():
        if name in grids:
            mask = torch.zeros_like(mask)
        parameter = block.get_parameter(name)
        parameter.copy_(rounded(parameter, before.get_parameter(name).to(mask.device), mask))


def rounded(trained: Tensor, before: Tensor, kept: Tensor) -> Tensor:
    """Trained weights in the dtype of those before; what is kept does not become zero."""
    rounded = trained.to(before.dtype)
    return torch.where((rounded == 0) & kept, before, rounded)
