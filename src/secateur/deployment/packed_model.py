"""Models whose linear layers multiply by packed matrices, for inference on the CPU.

A packed product reads little, which is what counts at batch 1; which way is the fastest for more
rows depends on processor, shape and sparsity, so it is timed (autotune.py).
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.deployment.autotune import UNMEASURED, WAYS, Crossover, Crossovers, way_for
from secateur.deployment.packing import LEAST, check_groups, pack_matrix, packed_values
from secateur.kernels.packed import Packed, dense_product, quantised
from secateur.system.tensors import count_zeros


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, and the dense one where that is `kept` beside it."""

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        crossover: Crossover = UNMEASURED,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name in ("bitmap", "values", "starts", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.packed, self.kept = packed, kept
        self.way = cache(partial(way_for, crossover))

    def forward(self, x: Tensor) -> Tensor:
        way = self.way(x.numel() // self.in_features)
        kept = self.kept if way == "dense" else None
        y = WAYS[way](self.packed, x) if kept is None else linear(x, kept)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return y if bias is None else y + bias


class OwnLinear(nn.Module):
    """A dense linear layer with our own product at batch 1: what kernels give without zeros."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> None:
        super().__init__()
        weight, scales = quantised(weight) if int8 else (weight, None)
        for name, value in (("weight", weight.contiguous()), ("scales", scales), ("bias", bias)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        scales: Tensor | None = self.scales  # type: ignore[assignment]
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if x.numel() == x.shape[-1]:
            flat = x.reshape(-1) if scales is None else x.reshape(-1).float()
            if (y := dense_product(weight, flat, scales)) is not None:
                y = y.to(x.dtype).view(*x.shape[:-1], -1)
                return y if bias is None else y + bias
        if scales is not None:
            weight = (weight * scales[:, None]).to(x.dtype)
        return linear(x, weight, bias)


def packable(model: nn.Module, least: float = LEAST) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers whose weights are in memory and at least a share `least` of them zero."""
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.is_meta:
            continue
        if count_zeros(module.weight) >= least * module.weight.numel():
            yield name, module


def pack_model(
    model: nn.Module,
    *,
    least: float = LEAST,
    values: str = "as stored",
    keep_dense: bool = False,
    measure: bool = True,
) -> list[str]:
    """Replace the linear layers with enough zeros by packed ones, in place; returns their names.

    Of layers on the CPU in float32 or bfloat16, those with a share `least` of zeros are packed.
    `values` is `as stored`, or `int8`, `int4`, `int4 of group 64`, `int3 of row` and so on, to
    which weights are rounded that do not lie on such a grid. Each kind of matrix is timed for a
    second or so to find which way to multiply is the fastest at which batch (`measure`); with
    `keep_dense` the dense weights stay in memory too and are used where they are faster, so that no
    batch is slower than before. Other bfloat16 layers get our own product for batch 1.
    """
    names, wanted = [], packed_values(values)
    crossovers: dict[torch.dtype, Crossovers] = {}
    for name, module in list(packable(model, least)):
        weight = module.weight.data
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            continue
        check_groups(wanted, weight.shape[1], name)
        packed = pack_matrix(weight, wanted)
        if measure and weight.dtype not in crossovers:
            crossovers[weight.dtype] = Crossovers(weight.dtype, keep_dense=keep_dense)
        put_packed(model, name, packed, crossovers.get(weight.dtype))
        names.append(name)
    own_products(model)
    return names


def put_packed(model: nn.Module, name: str, packed: Packed, crossovers: Crossovers | None) -> None:
    """Replace a linear layer by a packed one, with the dense weight if that is ever faster."""
    layer: Any = model.get_submodule(name)
    crossover = crossovers.of(packed) if crossovers else UNMEASURED
    kept = layer.weight.data if "dense" in crossover.values() else None
    bias = getattr(layer.bias, "data", None)
    model.set_submodule(name, PackedLinear(packed, bias, crossover, kept))


def own_products(model: nn.Module, *, int8: bool = False) -> None:
    """Give every dense linear layer in bfloat16, or with `int8` any, our own product at batch 1."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (int8 or module.weight.dtype == torch.bfloat16):
            bias = getattr(module.bias, "data", None)
            model.set_submodule(name, OwnLinear(module.weight.data, bias, int8=int8))
