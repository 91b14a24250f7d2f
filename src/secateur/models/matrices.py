"""The weight matrices of a block that may be pruned.

Each is a view `[out, in]`: of a linear layer, of a Conv1D (GPT-2 stores `[in, out]`), or of one
expert's slice of a 3-D parameter. Routers, and whatever else is no such matrix, are not among them;
`coverage` says how much that leaves out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import NonFinite
from secateur.models import experts
from secateur.models.replay import LanguageModel
from secateur.system.tensors import is_finite

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class WeightMatrix:
    """One prunable matrix of a block: a view `[out, in]` of a parameter, however that is stored."""

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


def linear_layers(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a block that may be pruned, by name: routers are left out."""
    left_out = experts.routers(block)
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in left_out
    }


def weight_matrices(block: nn.Module) -> dict[str, WeightMatrix]:
    """The prunable matrices of a block by name, in its order: linear layers and single experts."""
    linear, fused = linear_layers(block), experts.fused_experts(block)
    matrices: list[WeightMatrix] = []
    for name, module in block.named_modules():
        if name in linear:
            weight: Tensor = module.weight.data  # type: ignore[assignment]
            transposed = isinstance(module, Conv1D)
            matrices.append(WeightMatrix(name, f"{name}.weight", weight, transposed))
        for part in experts.matrices(module) if name in fused else ():
            transposed = experts.is_transposed(module)
            matrices += [
                WeightMatrix(f"{name}.{expert}.{part}", f"{name}.{part}", weight, transposed, True)
                for expert, weight in enumerate(getattr(module, part).data)
            ]
    return {matrix.name: matrix for matrix in matrices}


def put(name: str, weight: Tensor, copies: Iterable[WeightMatrix]) -> None:
    """Write a new weight `[out, in]` into copies of a matrix, rounded as the first one is stored.

    `name` is the matrix's full name, for the error. Raises NonFinite.
    """
    first, *others = copies
    rounded = weight.to(first.stored.dtype)
    if not is_finite(rounded):
        raise NonFinite(
            f"The pruned weights of {name} do not fit {rounded.dtype}. "
            "Use another method, or --skip it."
        )
    for matrix in (first, *others):
        matrix.put(rounded)


def refuse_non_finite_weights(block: str, matrices: Mapping[str, WeightMatrix]) -> None:
    """Raise NonFinite for NaN or Inf in the stored weights of the block of that name."""
    for name, matrix in matrices.items():
        if not is_finite(matrix.stored):
            raise NonFinite(
                f"The weights of {block}.{name} hold NaN or Inf. Fetch the checkpoint again."
            )


def bias(block: nn.Module, matrix: WeightMatrix) -> tuple[str, Tensor] | None:
    """(name, values `[out]`) of the bias beside a weight matrix, a view; None where it has none."""
    if matrix.expert:
        owner, expert, part = matrix.name.rsplit(".", 2)
        if not getattr(block.get_submodule(owner), "has_bias", False):
            return None
        name = f"{owner}.{part}_bias"
        return name, block.get_parameter(name).data[int(expert)]
    values: Any = block.get_submodule(matrix.name).bias
    return None if values is None else (f"{matrix.name}.bias", values.data)


def signature(block: nn.Module) -> tuple[Any, ...]:
    """What blocks of one kind have in common; one trace serves them all.

    Module types, parameter shapes, flags and factors (a block may share keys, or gate sparsely).
    """
    signs: list[Any] = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    for name, module in block.named_modules():
        settings = [(k, v) for k, v in vars(module).items() if isinstance(v, (bool, float))]
        signs.append((name, type(module), *sorted(settings)))
    return tuple(signs)


def coverage(block: nn.Module) -> tuple[int, int]:
    """(weights that can be pruned, weights of all matrices) of a block; vectors are not counted."""
    covered = sum(matrix.stored.numel() for matrix in weight_matrices(block).values())
    return covered, sum(p.numel() for p in block.parameters() if p.dim() > 1)


def model_coverage(language_model: LanguageModel) -> float:
    """The share of the weights of all blocks' matrices that can be pruned."""
    counts = [coverage(block) for block in language_model.blocks]
    return sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)


def matrix_shapes(language_model: LanguageModel) -> Shapes:
    """`[out, in]` of every weight matrix by full name."""
    shapes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(language_model.blocks):
        for name, matrix in weight_matrices(block).items():
            rows, columns = matrix.weight.shape
            shapes[f"{language_model.block_name(index)}.{name}"] = rows, columns
    return shapes
