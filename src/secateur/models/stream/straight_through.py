"""A parameter that is trained while its matrices stay on a grid of values.

What is trained is a full weight; what the block multiplies by is the nearest level times the scale
that its group has. Rounding has no gradient, so the weight gets that of the rounded one
(straight-through, Bengio et al. 2013, arXiv:1308.3432). Scales stand still: trained as well (LSQ,
Esser et al. 2020, arXiv:1902.08153) they moved every weight of a group at once, and on the demo
model most blocks came out no better than they went in.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.methods.values import Codes, Values, find_codes
from secateur.models.matrices import WeightMatrix, weight_matrices


class StraightThrough(nn.Module):
    """What makes of a trained parameter the one on the grid, in the layout that it is stored in.

    `codes` of every matrix of the parameter in order, None for one that stays as it is; `kept`
    bool, of the parameter's shape: the rest is 0.
    """

    def __init__(
        self, codes: Sequence[Codes | None], kept: Tensor, transposed: bool, values: Values
    ):
        super().__init__()
        self.values, self.transposed, self.kept = values, transposed, nn.Buffer(kept)
        shapes = next(one for one in codes if one is not None)
        blank = Codes(shapes.levels, torch.ones_like(shapes.scales), shapes.zero_points)
        filled = [one or blank for one in codes]
        scales = torch.stack([one.scales for one in filled])
        zero_points = torch.stack([one.zero_points for one in filled])
        on_grid = torch.tensor([one is not None for one in codes])[:, None, None]
        self.scales, self.zero_points, self.on_grid = map(nn.Buffer, (scales, zero_points, on_grid))

    def forward(self, weight: Tensor) -> Tensor:
        matrices = weight.mT if self.transposed else weight
        matrices = matrices if weight.dim() == 3 else matrices[None]  # [matrices, out, in]
        groups = matrices.unflatten(2, (self.scales.shape[2], -1))
        ratios = groups / self.scales[..., None]
        levels = self.values.nearest(ratios.detach(), self.zero_points[..., None])
        rounded = (_passing(ratios, levels) * self.scales[..., None]).flatten(2)
        rounded = torch.where(self.on_grid, rounded, matrices)
        stored = rounded if weight.dim() == 3 else rounded[0]
        return (stored.mT if self.transposed else stored) * self.kept


def _passing(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradient of the exact ones."""
    return exact + (rounded - exact).detach() if torch.is_grad_enabled() else rounded


def grids_of(
    stored: nn.Module, kept: Mapping[str, Tensor], values: Values
) -> dict[str, StraightThrough]:
    """The grids of the parameters named in `kept` of a block as it is `stored`, by name.

    A parameter of which no matrix lies on one has none.
    """
    matrices: dict[str, list[WeightMatrix]] = {}
    for matrix in weight_matrices(stored).values():
        matrices.setdefault(matrix.parameter, []).append(matrix)
    grids: dict[str, StraightThrough] = {}
    for name, mask in kept.items():
        codes = [find_codes(matrix.weight, values) for matrix in matrices[name]]
        if any(codes):
            transposed = matrices[name][0].transposed
            grids[name] = StraightThrough(codes, mask, transposed, values).to(mask.device)
    return grids


def put_on_grid(block: nn.Module, grids: Mapping[str, StraightThrough]) -> None:
    """Have the parameters of a block stay on their grids while they are trained."""
    for name, grid in grids.items():
        module, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(block.get_submodule(module), parameter, grid)


def take_off_grid(block: nn.Module, grids: Mapping[str, StraightThrough]) -> None:
    """Make plain parameters of those on a grid, with the values that they have there."""
    with torch.no_grad():
        for name in grids:
            module, _, parameter = name.rpartition(".")
            parametrize.remove_parametrizations(block.get_submodule(module), parameter)
