"""Models with packed matrices: which layers are packed, and how each multiplies at which batch,
measured when it is.

A packed product reads little, which is what counts at batch 1; a large batch is better served by
unpacking some rows at a time for a dense product, in bfloat16 or in float32, whichever this machine
is better at. Where the borders lie depends on processor, shape and sparsity, so they are measured
here, once for each kind of matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.kernels.library import library
from secateur.kernels.packed import (
    KINDS,
    MOST,
    Packed,
    dense_product,
    multiply,
    multiply_unpacked,
    pack,
    pack_int8,
    quantised,
)
from secateur.system.tensors import count_zeros

LEAST = 0.4
"""The share of zeros from which a layer is packed: under it a bfloat16 matrix is not smaller enough
to be faster.
"""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Where the ways to multiply are compared; in between, the largest of these that is not above
counts.
"""
REPEATS, ENOUGH, HOPELESS = 5, 0.05, 3.0
"""Calls of each way, seconds after which no more are made, and how many times slower than the best
is not tried on.
"""

WAYS: dict[str, Callable[[Packed, Tensor], Tensor]] = {
    "packed": multiply,
    "unpacked": multiply_unpacked,
    "unpacked to float32": lambda packed, x: multiply_unpacked(packed, x, torch.float32),
}


@dataclass(frozen=True)
class Crossover:
    """Which of `WAYS`, or `dense` where the dense matrix is kept, is used from which batch on, and
    what it gains.

    `gains` says for each of `BATCHES` how many times faster than torch's own dense product it is,
    as far as that one was tried.
    """

    ways: dict[int, str]
    gains: dict[int, float]

    def way(self, batch: int) -> str:
        """What to use for a batch."""
        return self.ways[max((b for b in self.ways if b <= batch), default=min(self.ways))]


DEFAULT = Crossover({1: "packed", MOST + 1: "unpacked"}, {})
"""Where nothing was measured."""


def measure_crossover(packed: Packed, dtype: torch.dtype, *, keep_dense: bool) -> Crossover:
    """The fastest way for each of `BATCHES`, activations in `dtype`, the best of a few calls each,
    in turn.

    `dense` may win only with `keep_dense`; a gain under 1 says where it would have.
    """
    dense = packed.dense(dtype=dtype)
    fast = packed.values.dtype in KINDS and library() is not None
    tried = {name: WAYS[name] for name in (WAYS if fast else ["unpacked"])}
    tried["dense"] = lambda packed, x: linear(x, dense)
    ways: dict[int, str] = {}
    gains: dict[int, float] = {}
    for batch in BATCHES:
        x = torch.randn(batch, packed.columns, generator=torch.Generator().manual_seed(batch)).to(
            dtype
        )
        seconds = dict.fromkeys(tried, float("inf"))
        started = perf_counter()
        for repeat in range(REPEATS):
            for name, way in tried.items():
                begun = perf_counter()
                way(packed, x)
                seconds[name] = min(seconds[name], perf_counter() - begun)
            if repeat and perf_counter() - started > ENOUGH:
                break
        allowed = [name for name in seconds if keep_dense or name != "dense"]
        ways[batch] = min(allowed, key=lambda name: seconds[name])
        if "dense" in seconds:
            gains[batch] = seconds["dense"] / seconds[ways[batch]]
        if batch > MOST:  # the small batches decide little, and the first call of a way is slow
            hopeless = HOPELESS * min(seconds[name] for name in allowed)
            tried = {name: way for name, way in tried.items() if seconds[name] <= hopeless}
    return Crossover(ways, gains)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; for inference on the CPU. `kept` is the dense weight,
    where it is kept.
    """

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        crossover: Crossover = DEFAULT,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name in ("bitmap", "values", "starts", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.packed, self.kept = packed, kept
        self.way = cache(crossover.way)

    def forward(self, x: Tensor) -> Tensor:
        way = self.way(x.numel() // self.in_features)
        y = (
            linear(x, self.kept)
            if way == "dense" and self.kept is not None
            else WAYS[way](self.packed, x)
        )
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return y if bias is None else y + bias


class OwnLinear(nn.Module):
    """A dense linear layer with our own product at batch 1, torch's else: what kernels give without
    zeros.
    """

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
            return linear(x, (weight * scales[:, None]).to(x.dtype), bias)
        return linear(x, weight, bias)


def packable(model: nn.Module, least: float = LEAST) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers on the CPU, float32 or bfloat16, of which at least a share `least` is
    zero.
    """
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.device.type != "cpu":
            continue
        weight = module.weight
        if (
            weight.dtype in (torch.float32, torch.bfloat16)
            and count_zeros(weight) >= least * weight.numel()
        ):
            yield name, module


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


class Crossovers:
    """Crossovers by kind of matrix, each measured once. `measured` holds them by (rows, columns,
    sparsity, values).
    """

    def __init__(self, dtype: torch.dtype, *, keep_dense: bool = False) -> None:
        self.dtype, self.keep_dense = dtype, keep_dense
        self.measured: dict[tuple[int, int, float, torch.dtype], Crossover] = {}

    def of(self, packed: Packed) -> Crossover:
        sparsity = round(20 * (1 - int(packed.starts[-1]) / (packed.rows * packed.columns))) / 20
        key = (packed.rows, packed.columns, sparsity, packed.values.dtype)
        if key not in self.measured:
            self.measured[key] = measure_crossover(packed, self.dtype, keep_dense=self.keep_dense)
        return self.measured[key]


def pack_model(
    model: nn.Module,
    *,
    least: float = LEAST,
    values: str = "as stored",
    keep_dense: bool = False,
    measure: bool = True,
) -> list[str]:
    """Replace the linear layers that have enough zeros by packed ones, in place; returns their
    names.

    `least` is the share of zeros that is enough. `values` is `as stored` or `int8`, which rounds
    the weights. Each kind of matrix is timed for a second or so to find which way to multiply is
    the fastest at which batch (`measure`); with `keep_dense` the dense weights stay in memory too
    and are used where they are faster, so that no batch is slower than before. Other bfloat16
    layers get our own product for batch 1. For inference on the CPU.
    """
    names = []
    crossovers: dict[torch.dtype, Crossovers] = {}
    for name, module in list(packable(model, least)):
        dtype = module.weight.dtype
        packed = pack_int8(module.weight.data) if values == "int8" else pack(module.weight.data)
        if measure and dtype not in crossovers:
            crossovers[dtype] = Crossovers(dtype, keep_dense=keep_dense)
        put_packed(model, name, packed, crossovers.get(dtype))
        names.append(name)
    own_products(model)
    return names


def put_packed(model: nn.Module, name: str, packed: Packed, crossovers: Crossovers | None) -> None:
    """Replace a linear layer by a packed one; its dense weight is kept where the crossover asks for
    it.
    """
    layer: Any = model.get_submodule(name)
    crossover = crossovers.of(packed) if crossovers else DEFAULT
    kept = layer.weight.data if "dense" in crossover.ways.values() else None
    put(
        model,
        name,
        PackedLinear(packed, None if layer.bias is None else layer.bias.data, crossover, kept),
    )


def own_products(model: nn.Module, *, int8: bool = False) -> None:
    """Give every dense linear layer in bfloat16, or with `int8` any, our own product at batch 1, in
    place.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (int8 or module.weight.dtype == torch.bfloat16):
            bias = None if module.bias is None else module.bias.data
            put(model, name, OwnLinear(module.weight.data, bias, int8=int8))
