"""Products with 2:4 matrices on a GPU, for one to eight rows of x (two_of_four_triton.py).

Tensor cores have 2:4 products, but what is to be had of them at these batches pads x and is slower
than a dense product. Here only the bytes count: of every four weights two are stored, with two bits
each for where they were, 1.125 bytes a weight at 16 bits. Nothing is looked up, so a row costs
about five instructions for 32 weights at batch 1; each further row of x adds one and a half, and at
batch 8 the instructions, not the bytes, set the time.

On an H200 1.5 to 1.8 times as fast as the dense product for one row of x, 1.2 to 1.4 for two, and
slower from four rows on (bench/gpu.py).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.errors import BadPattern, NonFinite
from secateur.kernels.device import check_dtype, fastest, no_device
from secateur.kernels.masks import crowded

GROUP, UNIT, MOST = 4, 8, 8
"""Columns of a group and of a byte of metadata, rows of x that one product takes."""
ROWS_AT_ONCE = 1024
"""How many rows are packed at a time, which bounds the memory that it takes."""
PLACES = dict.fromkeys([0b0000, 0b0001, 0b0010, 0b0011], (0, 1))
PLACES |= {0b0100: (0, 2), 0b0101: (0, 2), 0b0110: (1, 2)}
PLACES |= {0b1000: (0, 3), 0b1001: (0, 3), 0b1010: (1, 3), 0b1100: (2, 3)}
"""Which two columns of a group are stored, by what is not zero in it: bit j for column j."""


@dataclass(frozen=True)
class TwoOfFour:
    """A packed 2:4 matrix: `values` `[rows, columns / 2]` float16 or bfloat16, and `meta` uint8
    `[rows, columns / 8]`, the place of each in its group, two bits a value from the lowest up.
    """

    values: Tensor
    meta: Tensor

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def columns(self) -> int:
        return 2 * self.values.shape[1]

    @property
    def bytes(self) -> int:
        """What is read for one product."""
        return 2 * self.values.numel() + self.meta.numel()


class Configuration(NamedTuple):
    """How the kernel is launched: rows of W that share what a program reads of x, and its warps."""

    rows_at_once: int
    warps: int


CONFIGURATIONS = [Configuration(rows, warps) for rows in (1, 2, 4) for warps in (1, 2, 4)]
FIXED = Configuration(rows_at_once=2, warps=4)
"""What is used where nothing can be measured."""
MOST_SUMS = 16
"""Rows of W times rows of x for which a lane's sums stay in registers."""


def missing() -> str | None:
    """Why these products cannot be used here, None where they can."""
    if not torch.cuda.is_available():
        return no_device()
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with torch for CUDA"
    return None


def pack(weight: Tensor, *, name: str, device: torch.device | str = "cuda") -> TwoOfFour:
    """Pack a 2:4 matrix `[rows, columns]`, float16 or bfloat16, and put it on the device.

    -0.0 counts as zero. Raises BadCheckpoint for another dtype, NonFinite where a weight is NaN,
    BadPattern where the matrix is not 2:4 or its columns are no multiple of eight.
    """
    check_dtype(weight, name)
    if weight.shape[1] % UNIT:
        raise BadPattern(
            f"{name} has {weight.shape[1]} inputs; "
            f"packed 2:4 matrices need a multiple of {UNIT}. Leave it dense."
        )
    check_two_of_four(weight, name=name)
    parts = [_pack_rows(part) for part in weight.detach().split(ROWS_AT_ONCE)]
    values, meta = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    return TwoOfFour(values, meta)


def check_two_of_four(weight: Tensor, *, name: str) -> None:
    """Raise NonFinite for NaN in a weight `[out, in]`, BadPattern unless it is 2:4."""
    if weight.shape[1] % GROUP:
        raise BadPattern(
            f"2:4 needs inputs in fours; {name} has {weight.shape[1]}. Leave it dense."
        )
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE]
        if part.isnan().any():
            raise NonFinite(
                f"{name} holds NaN, so there is nothing to multiply with. Prune the model again."
            )
        if (full := crowded(part, 2, 4).nonzero()).numel():
            row, group = full[0].tolist()
            kept = int(part[row, GROUP * group : GROUP * group + GROUP].count_nonzero())
            raise BadPattern(
                f"{name} is not 2:4: inputs {GROUP * group} to {GROUP * group + 3} of output "
                f"{start + row} keep {kept} weights, two were wanted. Prune it with --pattern 2:4."
            )


def _pack_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.contiguous().view(len(weight), -1, GROUP)
    table = torch.zeros(2**GROUP, 2, dtype=torch.int64)
    for bits, places in PLACES.items():
        table[bits] = torch.tensor(places)
    powers = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    kept = ((groups != 0) * powers).sum(-1)
    places = table.to(weight.device)[kept]  # [rows, columns / 4, 2]
    values = groups.gather(-1, places).view(len(weight), -1) + 0  # -0.0 becomes +0.0
    shifts = torch.tensor([0, 2, 4, 6], device=weight.device)
    meta = (places.view(len(weight), -1, 4) << shifts).sum(-1)  # two groups a byte
    return values, meta.to(torch.uint8)


def unpack(packed: TwoOfFour) -> Tensor:
    """The dense matrix `[rows, columns]`, zeros +0.0, where the packed one is."""
    shifts = torch.tensor([0, 2, 4, 6], device=packed.meta.device)
    places = (packed.meta.long()[..., None] >> shifts & 3).view(packed.rows, -1, 2)
    dense = packed.values.new_zeros(packed.rows, packed.columns // GROUP, GROUP)
    dense.scatter_(-1, places, packed.values.view(places.shape))
    return dense.view(packed.rows, packed.columns)


def multiply(packed: TwoOfFour, x: Tensor, *, configuration: Configuration | None = None) -> Tensor:
    """Multiply x `[…, columns]` by the matrix transposed: `[…, rows]` in the dtype of x.

    The activations are rounded to the dtype of the values, and summed in float32. More rows of x
    than `MOST` take several turns. Without a `configuration` the best one is measured at the first
    product of a shape, which must not be in a CUDA graph.
    """
    flat = x.reshape(-1, packed.columns).to(packed.values.dtype).contiguous()
    if flat.storage_offset() % GROUP:  # four activations are read as one number
        flat = flat.clone()
    y = torch.empty(len(flat), packed.rows, dtype=x.dtype, device=x.device)
    for start in range(0, len(flat), MOST):
        part = flat[start : start + MOST]
        shape = (packed.rows, packed.columns, len(part))
        chosen = configuration or best_configuration(*shape, part.dtype, x.device)
        launch(packed, part, y[start : start + MOST], chosen)
    return y.view(*x.shape[:-1], packed.rows)


def launch(packed: TwoOfFour, x: Tensor, y: Tensor, configuration: Configuration) -> None:
    """Write x `[batch, columns]` Wᵀ to y `[batch, rows]` of any dtype, on the current stream."""
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    from secateur.kernels import two_of_four_triton

    kernel: Any = two_of_four_triton.multiply
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(-(-packed.rows // configuration.rows_at_once),)](
            packed.values.view(torch.uint64),
            packed.meta,
            x.view(torch.uint64),
            y,
            packed.rows,
            packed.columns // UNIT,
            rows_at_once=configuration.rows_at_once,
            batch=len(x),
            lanes=32 * configuration.warps,
            dtype=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
            num_warps=configuration.warps,
            enable_fp_fusion=True,
        )


@cache
def best_configuration(
    rows: int, columns: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Configuration:
    """The fastest of `CONFIGURATIONS` for a shape, measured once on a device; `FIXED` on a CPU."""
    if device.type != "cuda":
        return FIXED
    values = torch.zeros(rows, columns // 2, dtype=dtype, device=device)
    meta = torch.full((rows, columns // UNIT), 0b01000100, dtype=torch.uint8, device=device)
    x, y = (torch.zeros(batch, size, dtype=dtype, device=device) for size in (columns, rows))
    packed = TwoOfFour(values, meta)
    works = {
        configuration: lambda configuration=configuration: launch(packed, x, y, configuration)
        for configuration in CONFIGURATIONS
        if configuration.rows_at_once * batch <= MOST_SUMS
    }
    return fastest(works, device)
