"""What this machine can run: each runtime and format, and the reason where it cannot."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch

from secateur.deployment.formats import FORMATS
from secateur.deployment.runtimes import RUNTIMES
from secateur.kernels.library import isa
from secateur.system.machine import machine, versions

OPTIONAL = ("lm-eval", "peft", "triton")
"""Packages that may be wanted, besides those of a runtime or a format."""


@dataclass(frozen=True)
class Examination:
    """What this machine has: `packed` is the instruction set of the packed products, None where
    they were not compiled; `runtimes` says why each cannot be used here, None where it can.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    packed: str | None
    cuda: str | None
    cusparselt: int | None
    runtimes: dict[str, str | None]
    formats: dict[str, str]
    packages: dict[str, str | None]


def examine() -> Examination:
    """Look at this machine; nothing is run that takes longer than a moment."""
    cuda = torch.cuda.is_available()
    named = [known.packages for known in (*FORMATS.values(), *RUNTIMES.values())]
    sparselt = torch.backends.cusparselt
    return Examination(
        machine(),
        versions(),
        isa(),
        f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}" if cuda else None,
        sparselt.version() if cuda and sparselt.is_available() else None,
        {name: runtime.missing() for name, runtime in RUNTIMES.items()},
        {name: known.loaded_by for name, known in FORMATS.items()},
        {name: _version(name) for name in chain(OPTIONAL, *named)},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
