"""A block with groups of channels, experts or nothing taken out: its tensors in their new shapes,
and a stock module that runs them.

What is sliced are rows and columns of the matrices of a group, and the biases that go with the
rows. The module is the one that the family itself builds for the new configuration
(`target_config`), so what runs is what every loader will run.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModel
from secateur.models import experts
from secateur.models.channels.groups import ChannelGroup
from secateur.models.matrices import WeightMatrix, weight_matrices

State = dict[str, Tensor]
"""The tensors of a block by their name in it."""


def without_groups(block: nn.Module, removed: Mapping[str, Iterable[ChannelGroup]]) -> State:
    """The tensors of a block without groups of channels, by the matrix whose inputs they are.

    The block is not changed. Tensors that are not sliced are its own.
    """
    rows: dict[str, set[int]] = defaultdict(set)
    columns: dict[str, set[int]] = defaultdict(set)
    for reader, groups in removed.items():
        for group in groups:
            columns[reader].update(group.inputs)
            for name, channel in group.outputs:
                rows[name].add(channel)
    state: State = dict(block.state_dict())
    sliced: dict[str, list[tuple[WeightMatrix, Tensor, Tensor]]] = defaultdict(list)
    for name, matrix in weight_matrices(block).items():
        if name in rows or name in columns or (matrix.expert and matrix.parameter in sliced):
            out, inputs = matrix.weight.shape
            sliced[matrix.parameter].append(
                (matrix, _others(out, rows[name]), _others(inputs, columns[name]))
            )
    for parameter, parts in sliced.items():
        fused = parts[0][0].expert
        slices = [_slice(matrix, out, inputs) for matrix, out, inputs in parts]
        if not fused:
            state[parameter] = slices[0]
        elif len(slices) == len(state[parameter]):
            state[parameter] = torch.stack(slices)
        name = f"{parameter}_bias" if fused else f"{parameter.removesuffix('weight')}bias"
        if (bias := state.get(name)) is not None:
            biases = bias if fused else bias[None]
            left = [one[out] for one, (_, out, _) in zip(biases, parts, strict=True)]
            state[name] = torch.stack(left) if fused else left[0]
    return state


def _others(size: int, removed: Collection[int]) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(removed)] = False
    return kept.nonzero().flatten()


def _slice(matrix: WeightMatrix, out: Tensor, inputs: Tensor) -> Tensor:
    """The rows `out` and the columns `inputs` of a matrix, as it is stored."""
    left = matrix.weight[out.to(matrix.weight.device)][:, inputs.to(matrix.weight.device)]
    return (left.T if matrix.transposed else left).contiguous()


def without_experts(block: nn.Module, state: State, kept: Mapping[str, Tensor]) -> State:
    """The tensors of a block without some experts; `kept`: those that stay, int64, by module.

    With an expert go its two matrices, and its row of whatever chooses experts: router weights and
    biases beside it.
    """
    state, routers = dict(state), experts.routers(block)
    for name, indices in kept.items():
        module = block.get_submodule(name)
        count = experts.count(module)
        parent = name.rpartition(".")[0]
        for key, tensor in state.items():
            if not tensor.dim():
                continue
            owner = key.rpartition(".")[0]
            inside = owner == name or (
                key.startswith(f"{parent}." if parent else "")
                and (
                    min(tensor.dim(), len(tensor.squeeze().shape)) == 1
                    or block.get_submodule(owner) in routers
                )
                and not owner.startswith(f"{name}.")
            )
            along = 0 if len(tensor) == count else 1
            if inside and (along == 0 or tensor.shape == (1, count)):  # as Ernie's correction bias
                state[key] = tensor.index_select(along, indices.to(tensor.device)).contiguous()
    return state


def module_of(empty: nn.Module, state: Mapping[str, Tensor], original: nn.Module) -> nn.Module:
    """The stock module `empty` (on the meta device) with these tensors and the original's buffers.

    Raises UnsupportedModel where a buffer that is not stored has another shape in the smaller
    block.
    """
    block = deepcopy(empty)
    block.load_state_dict(state, assign=True)
    buffers = dict(original.named_buffers())
    for name, buffer in list(block.named_buffers()):
        if not buffer.is_meta:
            continue
        if name not in buffers or buffers[name].shape != buffer.shape:
            raise UnsupportedModel(
                f"A {type(original).__name__} computes {name} from the sizes that would change."
            )
        owner, _, leaf = name.rpartition(".")
        block.get_submodule(owner)._buffers[leaf] = buffers[name].clone()
    return block.eval()
