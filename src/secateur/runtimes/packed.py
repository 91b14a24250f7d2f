"""transformers with packed matrices: what is zero is neither stored nor read (packed.py). For decoding on the CPU."""

from pathlib import Path

import torch

from secateur.errors import UnsupportedModel
from secateur.packed import isa, pack_model
from secateur.runtimes.base import Running, Runtime, Stepped
from secateur.runtimes.eager import bytes_read, load_model


def missing() -> str | None:
    if isa() is None:
        return "the package was installed without a C compiler; install gcc or clang and install it again"
    return None


def load(folder: Path, dtype: torch.dtype) -> Running:
    """Raises UnsupportedModel where no matrix has enough zeros to be packed."""
    model = load_model(folder, dtype)
    if not pack_model(model):
        raise UnsupportedModel(f"{folder} has no matrix with 40 % zeros or more, so there is nothing to pack.")
    return Stepped(model, bytes_read(model))


packed = Runtime(missing, load)
