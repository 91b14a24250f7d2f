"""transformers with packed matrices on the CPU: what is zero is neither stored nor read.

Matrices are packed as they are read, so that the dense model is never in memory. Beside them the
same with dense matrices, so that one sees what the kernels give without zeros: the ratio of
`packed` to `own-dense` is the gain by zeros alone. Both exist with int8 values too, packed ones
with int4, or with fewer bits where the folder has them.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, open_checkpoint
from secateur.deployment.formats.codes import values_of
from secateur.deployment.packed_loading import ModuleOf, load_packing
from secateur.deployment.packed_model import own_products
from secateur.deployment.packing import (
    LEAST,
    can_pack,
    enough_zeros,
    fitting,
    pack_rows,
    packed_values,
    rows_of,
)
from secateur.deployment.runtimes.base import Runtime, Stepped, load_model
from secateur.errors import UnsupportedModel
from secateur.kernels.library import isa
from secateur.kernels.packed import Packed
from secateur.methods.values import AS_STORED

LIKE = {"int8": ("int8",), "int4": ("int4", "int3", "int2")}
"""The grids of a folder that are taken as they are where values of such a kind are wanted."""


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
    source, packed = open_checkpoint(folder), list[str]()
    of_folder, wanted = values_of(folder), packed_values(values)
    if wanted and of_folder and of_folder.name in LIKE[wanted.name] and can_pack(of_folder):
        wanted = packed_values(str(of_folder))

    def read(module_of: ModuleOf) -> Iterator[tuple[str, Tensor | Packed]]:
        for name, place in source.places.items():
            matrix = len(place.shape) == 2 and place.dtype in FLOATS
            if not matrix or module_of(name) is None or not enough_zeros(source, name):
                yield name, source.tensor(name)
                continue
            whole = wanted and fitting(wanted, place.shape[1])
            parts = rows_of(source, name)
            packed.append(name)
            yield name, pack_rows(parts if whole else (part.to(dtype) for part in parts), whole)[0]
        if not packed:
            raise UnsupportedModel(
                f"{folder} has no matrix with {LEAST:.0%} zeros or more, so there is nothing to "
                "pack."
            )

    return Stepped(load_packing(folder, read, len(source.places), dtype, **trust))


def load_dense(folder: Path, dtype: torch.dtype, *, int8: bool, **trust: Any) -> Stepped:
    """Raises UnsupportedModel for a dtype that our dense product does not take."""
    if not int8 and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedModel(f"Our own dense product is for bfloat16, not for {name}.")
    model = load_model(folder, dtype, **trust)
    own_products(model, int8=int8)
    return Stepped(model)


_as_stored, _as_int8, _as_int4 = (
    partial(load_packed, values=values) for values in (AS_STORED, "int8", "int4")
)
packed = Runtime(missing, _as_stored, twin="own-dense", runs_code=True)
packed_int8 = Runtime(missing, _as_int8, twin="own-int8", rounded="int8", runs_code=True)
packed_int4 = Runtime(missing, _as_int4, rounded="int4", runs_code=True)
own_dense = Runtime(no_dense, partial(load_dense, int8=False), runs_code=True)
own_int8 = Runtime(no_dense, partial(load_dense, int8=True), rounded="int8", runs_code=True)
