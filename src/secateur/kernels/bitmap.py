"""Products with packed matrices (packed.py) on a CUDA device, for one to eight rows of x.

The kernel, bitmap.cu, is compiled at run time by NVRTC, which comes with torch for CUDA, so that
neither a toolkit nor a C++ compiler is wanted on the machine. On an H200 it reads six tenths of
what memory gives at best (bench/gpu.py): 1.0 to 1.3 times as fast as the dense product for one row
of x, slower from two or four rows on. Matrices for large batches are better kept dense: this reads
fewer bytes, it does not compute less.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NonFinite
from secateur.kernels import packed as on_cpu
from secateur.kernels.device import DTYPES, check_dtype, no_device
from secateur.kernels.packed import MOST, Packed

SOURCE = Path(__file__).with_name("bitmap.cu")
ROWS, THREADS, STEP = 4, 128, 128
"""Of the kernel: rows of W and threads of a block, and columns that x is padded to multiples of."""


def missing() -> str | None:
    """Why these products cannot be used here, None where they can."""
    if (reason := no_device()) is not None:
        return reason
    if not hasattr(torch.cuda, "_compile_kernel"):
        return (
            f"torch {torch.__version__} cannot compile kernels at run time; "
            "install torch 2.10 or later"
        )
    return None


def pack(weight: Tensor, *, name: str, device: torch.device | str = "cuda") -> Packed:
    """Pack a matrix `[rows, columns]`, float16 or bfloat16, and put it on the device.

    Raises BadCheckpoint for another dtype, NonFinite where a weight is NaN.
    """
    check_dtype(weight, name)
    if weight.isnan().any():
        raise NonFinite(
            f"{name} holds NaN, so there is nothing to multiply with. Prune the model again."
        )
    return _moved(on_cpu.pack(weight.detach().cpu()), device)


def unpack(packed: Packed) -> Tensor:
    """The dense matrix `[rows, columns]` on the CPU, zeros +0.0."""
    return _moved(packed, "cpu").dense().contiguous()


def _moved(packed: Packed, device: torch.device | str) -> Packed:
    bitmap, values, starts = (tensor.to(device) for tensor in packed.tensors)
    return replace(packed, bitmap=bitmap, values=values, starts=starts)


def multiply(packed: Packed, x: Tensor) -> Tensor:
    """Multiply x `[…, columns]` by the matrix transposed: `[…, rows]` in the dtype of x.

    The activations are rounded to the dtype of the values, and summed in float32. More rows of x
    than `MOST` take several turns.
    """
    flat = x.reshape(-1, packed.columns).to(packed.values.dtype)
    dtype = x.dtype if x.dtype == packed.values.dtype else torch.float32
    y = torch.empty(len(flat), packed.rows, dtype=dtype, device=x.device)
    for start in range(0, len(flat), MOST):
        _launch(packed, flat[start : start + MOST], y[start : start + MOST])
    return y.to(x.dtype).view(*x.shape[:-1], packed.rows)


def _launch(packed: Packed, x: Tensor, y: Tensor) -> None:
    """Write x `[batch, columns]` Wᵀ to y `[batch, rows]`, float32 or as the values."""
    values, width = packed.values, -(-packed.columns // STEP) * STEP
    if width > packed.columns:
        x = nn.functional.pad(x, (0, width - packed.columns))
    x = x.contiguous()
    if x.data_ptr() % 8:  # a lane loads four activations at once
        x = x.clone()
    assert values.dtype in DTYPES, f"the kernel is for values of 16 bits, not {values.dtype}"
    assert values.data_ptr() % 16 == 0, "the kernel copies 16 bytes at once"
    with torch.cuda.device(x.device):
        kernel = _compiled(len(x), values.dtype == torch.bfloat16, torch.cuda.current_device())
        sizes = (packed.rows, 2 * packed.bitmap.shape[1], width, int(y.dtype == values.dtype))
        arguments = [packed.bitmap, values, packed.starts, x, y, *sizes]
        kernel(grid=(-(-packed.rows // ROWS), 1, 1), block=(THREADS, 1, 1), args=arguments)


@cache
def _compiled(batch: int, bfloat: bool, device: int) -> Callable[..., Any]:
    """The kernel for one batch and type on one device, which is the current one."""
    from torch.utils import cpp_extension

    toolkit = cpp_extension.CUDA_HOME
    try:
        # torch asks for a toolkit's headers before it compiles; this source includes none.
        cpp_extension.CUDA_HOME = toolkit or "/usr"
        return torch.cuda._compile_kernel(
            SOURCE.read_text("utf-8"), f"multiply<{batch}, {str(bfloat).lower()}>"
        )
    finally:
        cpp_extension.CUDA_HOME = toolkit
