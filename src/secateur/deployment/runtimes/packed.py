"""transformers with packed matrices on the CPU: what is zero is neither stored nor read.

Beside them the same with dense matrices, so that one sees what the kernels give without zeros: the
ratio of `packed` to `own-dense` is the gain by zeros alone. Both exist with int8 values too.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.deployment.packed_model import LEAST, own_products, pack_model
from secateur.deployment.runtimes.base import Runtime, Stepped, load_model
from secateur.errors import UnsupportedModel
from secateur.kernels.library import isa


def missing() -> str | None:
    if isa() is None:
        return (
            "the package was installed without a C compiler; "
            "install gcc or clang and install it again"
        )
    return None


def no_dense() -> str | None:
    """Why there is no dense product of our own."""
    return missing() or ("there is none for this processor" if isa() == "portable" else None)


def load_packed(folder: Path, dtype: torch.dtype, *, values: str, **trust: Any) -> Stepped:
    """Raises UnsupportedModel where no matrix has enough zeros to be packed."""
    model = load_model(folder, dtype, **trust)
    if not pack_model(model, values=values):
        raise UnsupportedModel(
            f"{folder} has no matrix with {LEAST:.0%} zeros or more, so there is nothing to pack."
        )
    return Stepped(model)


def load_dense(folder: Path, dtype: torch.dtype, *, int8: bool, **trust: Any) -> Stepped:
    """Raises UnsupportedModel for a dtype that our dense product does not take."""
    if not int8 and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedModel(f"Our own dense product is for bfloat16, not for {name}.")
    model = load_model(folder, dtype, **trust)
    own_products(model, int8=int8)
    return Stepped(model)


_as_stored, _as_int8 = (partial(load_packed, values=values) for values in ("as stored", "int8"))
packed = Runtime(missing, _as_stored, twin="own-dense", runs_code=True)
packed_int8 = Runtime(missing, _as_int8, twin="own-int8", rounded="int8", runs_code=True)
own_dense = Runtime(no_dense, partial(load_dense, int8=False), runs_code=True)
own_int8 = Runtime(no_dense, partial(load_dense, int8=True), rounded="int8", runs_code=True)
