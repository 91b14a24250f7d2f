"""Plain transformers, on the CPU or a CUDA device: zeros are multiplied like other numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.deployment.runtimes.base import Runtime, Stepped, load_model


def load(folder: Path, dtype: torch.dtype, device: str = "cpu", **trust: Any) -> Stepped:
    return Stepped(load_model(folder, dtype, device, **trust))


def no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device"


eager = Runtime(lambda: None, load, runs_code=True)
eager_cuda = Runtime(no_cuda, partial(load, device="cuda"), runs_code=True)
