"""Devices and dtypes as they are named in options."""

from dataclasses import dataclass

import torch

from secateur.errors import UnknownName
from secateur.system.machine import CPU, multiplies_bfloat16
from secateur.system.settings import Compute
from secateur.system.sizes import find_size

PASSES = ("one", "two", "auto")
"""How often blocks run."""


@dataclass(frozen=True)
class Resources:
    """`Compute` as it is read: the devices, the dtype of forward passes or "auto", how many bytes a
    run may take, None for all that are free, windows in a pass, and how often blocks run.
    """

    devices: list[torch.device]
    dtype: str
    limit: int | None
    batch_size: int
    passes: str


def find_resources(compute: Compute) -> Resources:
    """Read the options of a computation. Raises UnknownName."""
    if compute.passes not in PASSES:
        raise UnknownName("number of passes", compute.passes, PASSES)
    devices, limit = find_devices(compute.device), find_size(compute.memory)
    return Resources(devices, find_dtype(compute.dtype), limit, compute.batch_size, compute.passes)


def find_devices(text: str) -> list[torch.device]:
    """The devices that `text` names; `auto` is all GPUs, else the CPU. Raises UnknownName."""
    if text == "auto":
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [CPU]
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices = []
    for part in text.split(","):
        if part not in known and not (part == "cuda" and torch.cuda.is_available()):
            raise UnknownName("device here", part, [*known, "auto"])
        devices.append(torch.device(part))
    return devices


def find_dtype(name: str) -> str:
    """The name of a dtype for forward passes, checked. Raises UnknownName."""
    names = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    names |= {full: full for full in ("float32", "bfloat16", "float16")}
    if name not in names:
        raise UnknownName("dtype", name, names)
    return names[name]


def timed_dtype(name: str) -> torch.dtype:
    """The dtype of models timed on the CPU. Raises UnknownName for one without fast products."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if (full := find_dtype(name)) not in kinds:
        raise UnknownName("dtype that can be timed", name, kinds)
    return kinds[full]


def forward_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of forward passes; None is as stored. `auto`: as stored, but float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    return getattr(torch, name)


def calibration_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype | None:
    """The same for calibration passes: `auto` takes bfloat16 as stored if the CPU multiplies it."""
    if name == "auto" and stored == torch.bfloat16 and multiplies_bfloat16():
        return None
    return forward_dtype(name, device)


def training_dtype(name: str, device: torch.device, stored: torch.dtype) -> str:
    """What training multiplies in: "float32" or, under autocast, "bfloat16"; weights are float32.

    `auto` takes bfloat16 for what is stored in 16 bits where the device multiplies it. Raises
    UnknownName for float16, in which gradients vanish.
    """
    if (full := find_dtype(name)) == "float16":
        raise UnknownName("dtype to train in", name, ["auto", "float32", "bfloat16"])
    multiplies = torch.cuda.is_bf16_supported if device.type == "cuda" else multiplies_bfloat16
    if full == "auto":
        return "bfloat16" if stored.itemsize == 2 and multiplies() else "float32"
    return full
