"""A block with units, experts or nothing taken out: its tensors in their new shapes, and a stock
module that runs them.

What is cut are rows and columns of the matrices in a unit, and the biases that go with the rows.
The module is the one that the family itself builds for the new configuration (`target_config`), so
what runs here is what every loader will run.
"""

from __future__ import annotations

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


def without_units(block: nn.Module, gone: Mapping[str, Iterable[ChannelGroup]]) -> State:
    """The tensors of a block after units were cut out, given by the site whose inputs they are.

    The block is not changed. Tensors that are not cut are its own.
    """
    rows: dict[str, set[int]] = defaultdict(set)
    columns: dict[str, set[int]] = defaultdict(set)
    for reader, units in gone.items():
        for unit in units:
            columns[reader].update(unit.inputs)
            for site, channel in unit.outputs:
                rows[site].add(channel)
    state: State = dict(block.state_dict())
    fused: dict[str, list[tuple[WeightMatrix, Tensor, Tensor]]] = defaultdict(list)
    for name, site in weight_matrices(block).items():
        if name in rows or name in columns or (site.expert and site.parameter in fused):
            out, inputs = site.weight.shape
            fused[site.parameter].append(
                (site, _others(out, rows[name]), _others(inputs, columns[name]))
            )
    for parameter, parts in fused.items():
        cuts = [_cut(state, site, out, inputs) for site, out, inputs in parts]
        if not parts[0][0].expert:
            state[parameter] = cuts[0]
        elif len(cuts) == len(state[parameter]):
            state[parameter] = torch.stack(cuts)
        bias = (
            f"{parameter}_bias" if parts[0][0].expert else f"{parameter.removesuffix('weight')}bias"
        )
        if state.get(bias) is not None:
            held = state[bias] if parts[0][0].expert else state[bias][None]
            cut = torch.stack([part[out] for part, (_, out, _) in zip(held, parts, strict=True)])
            state[bias] = cut if parts[0][0].expert else cut[0]
    return state


def _others(size: int, gone: Collection[int]) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(gone)] = False
    return kept.nonzero().flatten()


def _cut(state: Mapping[str, Tensor], site: WeightMatrix, out: Tensor, inputs: Tensor) -> Tensor:
    stored = state[site.parameter]
    if site.expert:
        stored = stored[int(site.name.rsplit(".", 2)[1])]
    weight = stored.T if site.transposed else stored
    cut = weight[out.to(weight.device)][:, inputs.to(weight.device)]
    return (cut.T if site.transposed else cut).contiguous()


def without_experts(block: nn.Module, state: State, kept: Mapping[str, Tensor]) -> State:
    """The tensors of a block with fewer experts: `kept` gives for every experts module the int64
    indices that stay.

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
            if inside and count in (
                tensor.shape[:1].numel(),
                tensor.shape[1:].numel() if len(tensor) == 1 else 0,
            ):
                dimension = (
                    0 if len(tensor) == count else 1
                )  # Ernie's correction bias is [1, experts]
                state[key] = tensor.index_select(dimension, indices.to(tensor.device)).contiguous()
    return state


def experts_of(block: nn.Module) -> dict[str, int]:
    """How many experts every fused experts module of a block holds, by its name."""
    return {
        name: experts.count(module)
        for name, module in block.named_modules()
        if experts.is_experts(module)
    }


def module_of(empty: nn.Module, state: Mapping[str, Tensor], original: nn.Module) -> nn.Module:
    """The stock module `empty` (on the meta device) with these tensors, and the buffers of the
    original.

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
