"""Whether there is a GPU that the products here can run on."""

from __future__ import annotations

import torch

LEAST_CAPABILITY = (8, 0)
"""The first that multiplies bfloat16 and 2:4, and copies to shared memory past registers."""


def no_device() -> str | None:
    """Why there is no device for these products, None where there is one."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip:
        return "torch for ROCm was not tried here; an NVIDIA device is wanted"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "the device has compute capability {}.{}; 8.0 or more is wanted".format(*capability)
    return None
