"""SparseGPT's sweep over a block of columns on a GPU, in one launch (sweep_triton.py).

In torch every column is some launches that each read and write all later columns of the block. Here
a block is read and written once.

Run on an H200, where its masks are those of the processor's sweep (tests/kernels/test_kernels.py).
"""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE, WARPS, WIDEST = 4, 1, 256
"""Rows and warps of a program, the columns that its registers hold."""


@cache
def usable(width: int) -> bool:
    """Whether blocks of `width` columns can be swept by the kernel."""
    return width <= WIDEST and find_spec("triton") is not None


def sweep_block(
    values: Tensor, kept: Tensor, inverse: Tensor, alive: Tensor, m: int, n: int
) -> None:
    """Sweep values `[rows, width]` in place, with U of the block, `[width, width]`, both float32.

    Values are contiguous. n = 0: kept bool `[rows, width]`, contiguous, is given; otherwise the
    best n of every m are chosen, inputs that are not `alive` `[width]` last, and written.
    """
    from secateur.kernels import sweep_triton

    kernel: Any = sweep_triton.sweep_rows
    rows, width = values.shape
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        kernel[(-(-rows // ROWS_AT_ONCE),)](
            values,
            kept.view(torch.uint8),
            inverse,
            alive.float().contiguous(),
            rows,
            width,
            *inverse.stride(),
            m,
            n,
            choose=n > 0,
            rows_at_once=ROWS_AT_ONCE,
            columns=1 << (width - 1).bit_length(),
            num_warps=WARPS,
        )
