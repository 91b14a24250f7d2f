"""Which weights of a block are kept, and that they stay so when it is stored."""

from collections.abc import Mapping

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


@torch.no_grad()
def keep_masks(block: nn.Module, before: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Round trained parameters to the dtype they had `before`; none that is `kept` becomes zero."""
    for name, mask in kept.items():
        parameter = block.get_parameter(name)
        parameter.copy_(rounded(parameter, before.get_parameter(name).to(mask.device), mask))


def rounded(trained: Tensor, before: Tensor, kept: Tensor) -> Tensor:
    """Trained weights in the dtype of those before; what is kept does not become zero."""
    rounded = trained.to(before.dtype)
    return torch.where((rounded == 0) & kept, before, rounded)
