"""Plain transformers, on the CPU or a CUDA device: zeros are multiplied like other numbers."""

from pathlib import Path

import torch

from secateur.deployment.runtimes.base import Runtime, Stepped, load_model


def load(folder: Path, dtype: torch.dtype) -> Stepped:
    return Stepped(load_model(folder, dtype))


def load_on_device(folder: Path, dtype: torch.dtype) -> Stepped:
    return Stepped(load_model(folder, dtype, "cuda"))


def no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device"


eager = Runtime(lambda: None, load)
eager_cuda = Runtime(no_cuda, load_on_device)
