"""transformers on a CUDA device, decoding with packed matrices: 2:4, or a bitmap for other zeros.

Up to eight rows of x a product is bound by what is read of the weights, and the packed ones read
less (kernels/). More rows, prefill above all, are multiplied densely, so the dense matrix stays on
the device as well: this runtime saves time, not memory. Each shape is timed once at 1, 2, 4 and 8
rows, and dense products are used where they are not slower.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.deployment.autotune import choice_for, fastest_by_rows
from secateur.deployment.packed_model import packable
from secateur.deployment.packing import LEAST
from secateur.deployment.runtimes.base import Runtime, Stepped, bytes_read, load_model
from secateur.errors import BadPattern, UnsupportedModel
from secateur.kernels import bitmap, two_of_four

CLASSES = (1, 2, 4, 8)
"""Rows of x that are timed; another number uses what was measured for the next larger one."""
Product = Callable[[Tensor], Tensor]
Measure = Callable[[Product, Tensor], tuple[bool, ...]]


def packed_product(weight: Tensor, name: str) -> tuple[Product, int]:
    """The product with a packed matrix `[rows, columns]`, and the bytes that it reads."""
    if two_of_four.missing() is None and weight.shape[1] % 8 == 0:
        try:
            pairs = two_of_four.pack(weight, name=name, device=weight.device)
            return partial(two_of_four.multiply, pairs), pairs.bytes
        except BadPattern:
            pass
    packed = bitmap.pack(weight, name=name, device=weight.device)
    return partial(bitmap.multiply, packed), packed.bytes


def faster(product: Product, weight: Tensor) -> tuple[bool, ...]:
    """For each of `CLASSES` whether the packed product is faster than the dense one."""
    return fastest_by_rows(
        CLASSES, weight, lambda x: {False: partial(linear, x, weight), True: partial(product, x)}
    )


class DeviceLinear(nn.Module):
    """A linear layer that multiplies few rows of x by its packed weight where that is faster."""

    def __init__(self, dense: nn.Linear, product: Product, chosen: tuple[bool, ...]) -> None:
        super().__init__()
        self.dense, self.product, self.chosen = dense, product, chosen

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.dense.in_features
        if rows > CLASSES[-1] or not choice_for(self.chosen, CLASSES, rows):
            return self.dense(x)
        y = self.product(x)
        return y if self.dense.bias is None else y + self.dense.bias


def use_packed(model: nn.Module, measure: Measure) -> int:
    """Replace the layers with enough zeros in place; how many bytes less batch 1 reads.

    Layers of one shape and about one share of zeros are measured once.
    """
    chosen: dict[tuple[torch.Size, int], tuple[bool, ...]] = {}
    saved = 0
    for name, module in list(packable(model)):
        weight = module.weight.detach()
        product, size = packed_product(weight, name)
        kind = (weight.shape, round(5 * size / weight.nbytes))
        if kind not in chosen:
            chosen[kind] = measure(product, weight)
        if any(chosen[kind]):
            model.set_submodule(name, DeviceLinear(module, product, chosen[kind]))
            saved += weight.nbytes - size if chosen[kind][0] else 0
    return saved


@torch.no_grad()
def load(folder: Path, dtype: torch.dtype, **trust: Any) -> Stepped:
    """Raises UnsupportedModel for float32, and where no packed product is faster."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedModel(
            "The packed products for GPUs take bfloat16 and float16; use --dtype bfloat16."
        )
    model = load_model(folder, dtype, "cuda", **trust)
    read = bytes_read(model)
    saved = use_packed(model, faster)
    if not saved:
        raise UnsupportedModel(
            f"{folder} has no matrix with {LEAST:.0%} zeros or more "
            "whose packed product is faster on this device."
        )
    return Stepped(model, read - saved)


packed_cuda = Runtime(bitmap.missing, load, twin="eager-cuda", runs_code=True)
