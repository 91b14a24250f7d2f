"""Matrix operations counted while something runs, for the tests and the bench that hold formulas against them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from secateur.kernels import gram, rounding
from secateur.methods import column_sweep as sweep
from secateur.pruning.planning.meta import attention


def counted(work: Callable[[], object]) -> float:
    """The matrix operations of `work()`, counted while it runs on the CPU; attention with no use of its mask."""
    with ExitStack() as stack:
        for module in (gram, sweep, rounding):  # what is compiled cannot be counted
            stack.enter_context(patch.object(module, "library", lambda: None))
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=_FORMULAS))
        work()
    found = counter.get_flop_counts().get("Global", {})
    return sum(number / 3 if str(operation) in _THIRDS else number for operation, number in found.items())


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: lambda a, b, c, **_: 2 * b[0] * b[1] * c[1],
    torch.ops.aten.addr_: lambda a, b, c, **_: 2 * b[0] * c[0],
    torch.ops.aten.linalg_cholesky_ex: lambda a, **_: a[0] ** 3,  # in thirds, see below
    torch.ops.aten.cholesky_inverse: lambda a, **_: 2 * a[0] ** 3,
    torch.ops.aten.linalg_solve_triangular: lambda a, b, **_: b[0] ** 2 * b[1],
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],  # tokens sorted by expert
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: attention(q, k, v),
}
_THIRDS = ("aten.linalg_cholesky_ex", "aten.cholesky_inverse")
