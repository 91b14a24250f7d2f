"""The prunable matrices of a block, and the inputs that each of them sees.

A site is a matrix view `[out, in]`: a linear layer, a Conv1D (GPT-2 stores `[in, out]`), or one
expert's slice of a 3-D parameter. Routers, and whatever else is no such matrix, are not sites;
`coverage` says how much that leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.models import experts
from secateur.models.replay import LanguageModel

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class WeightMatrix:
    """One prunable matrix of a block: a view `[out, in]` of a parameter, whatever way the layer
    stores it.
    """

    name: str
    parameter: str
    stored: Tensor
    transposed: bool
    expert: bool = False

    @property
    def weight(self) -> Tensor:
        """The matrix `[out, in]`, sharing memory with the parameter."""
        return self.stored.T if self.transposed else self.stored

    def put(self, weight: Tensor) -> None:
        """Write `[out, in]` back, cast to the stored dtype; zeros become +0.0."""
        self.weight.copy_(weight.to(self.stored.dtype) + 0)


def weight_matrices(block: nn.Module) -> dict[str, WeightMatrix]:
    """The prunable matrices of a block by name: linear layers and single experts, routers left
    out.
    """
    found: dict[str, WeightMatrix] = {}
    left_out = experts.routers(block)
    for name, module in block.named_modules():
        if module in left_out:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            found[name] = WeightMatrix(
                name, f"{name}.weight", module.weight.data, isinstance(module, Conv1D)
            )
        elif experts.is_experts(module):
            for matrix in experts.matrices(module):
                for expert, weight in enumerate(getattr(module, matrix).data):
                    site = f"{name}.{expert}.{matrix}"
                    found[site] = WeightMatrix(
                        site, f"{name}.{matrix}", weight, experts.is_transposed(module), expert=True
                    )
    return found


def bias(block: nn.Module, site: WeightMatrix) -> tuple[str, Tensor] | None:
    """(name, values `[out]`) of a site's bias, a view; None where it has none."""
    if site.expert:
        owner, expert, matrix = site.name.rsplit(".", 2)
        if not getattr(block.get_submodule(owner), "has_bias", False):
            return None
        return f"{owner}.{matrix}_bias", block.get_parameter(f"{owner}.{matrix}_bias").data[
            int(expert)
        ]
    held = block.get_submodule(site.name).bias
    return None if held is None else (f"{site.name}.bias", held.data)  # type: ignore[return-value]


def signature(block: nn.Module) -> tuple[Any, ...]:
    """What blocks of one kind have in common; one trace serves them all.

    Module types, shapes of parameters, and flags and factors (a block may reuse the keys of
    another, or gate sparsely).
    """
    modules = [
        (
            name,
            type(module),
            *((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, (bool, float))),
        )
        for name, module in block.named_modules()
    ]
    return (
        *modules,
        *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters()),
    )


def coverage(block: nn.Module) -> tuple[int, int]:
    """(weights that are sites, weights of all matrices) of a block; vectors are not counted."""
    covered = sum(site.stored.numel() for site in weight_matrices(block).values())
    return covered, sum(p.numel() for p in block.parameters() if p.dim() > 1)


def model_coverage(language_model: LanguageModel) -> float:
    """The share of the weights of all blocks' matrices that can be pruned."""
    counts = [coverage(block) for block in language_model.blocks]
    return sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)


def matrix_shapes(language_model: LanguageModel) -> Shapes:
    """`[out, in]` of every site by full name."""
    return {
        f"{language_model.block_name(index)}.{name}": (site.weight.shape[0], site.weight.shape[1])
        for index, block in enumerate(language_model.blocks)
        for name, site in weight_matrices(block).items()
    }
