"""Names of hardware as people say them: what has sparse tensor cores, and whether a machine that
was measured is it.

A name is a line in `HARDWARE`. It is matched with what torch calls an accelerator, by whole words,
so that a card that is not in the table counts as not measured, never as another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import UnknownName

ACCELERATED = ("eager-cuda", "packed-cuda", "semi-structured", "vllm")
"""The runtimes that are timed on an accelerator; the others run on the processor."""


@dataclass(frozen=True)
class Hardware:
    """What a name means. `maker` is processor, apple, nvidia or amd; `words` are what the names of
    such devices hold.

    `two_of_four` says that it multiplies 2:4 matrices by hardware of its own, `says` in words what
    it has for them.
    """

    maker: str
    words: frozenset[str]
    two_of_four: bool
    says: str
    source: str
    date: str


_CUSPARSELT = "cuSPARSELt, supported architectures, docs.nvidia.com/cuda/cusparselt"
_READ = "2026-11-27"


def _nvidia(capability: str, words: str) -> Hardware:
    """A generation of NVIDIA's, or a card of it. Sparse tensor cores come with compute capability
    8.0.
    """
    has = float(capability) >= 8.0
    cores = (
        "and with it sparse tensor cores"
        if has
        else "no sparse tensor cores: those came with 8.0, Ampere"
    )
    return Hardware(
        "nvidia",
        frozenset(words.split()),
        has,
        f"has compute capability {capability}, {cores}",
        _CUSPARSELT,
        _READ,
    )


_AMPERE, _ADA = (
    "3060 3070 3080 3090 A10 A10G A30 A40 A100 A800 A4000 A5000 A6000",
    "4060 4070 4080 4090 L4 L40 L40S Ada",
)
_HOPPER, _BLACKWELL = "H100 H200 H800 GH200", "B100 B200 GB200 5090"
_NO_UNIT = (
    "has no unit for 2:4 that anything here uses; zeros give there what kernels that skip them give"
)

HARDWARE: Mapping[str, Hardware] = {
    "cpu": Hardware("processor", frozenset(), False, _NO_UNIT, "docs/speed.md", "2026-11-26"),
    "apple": Hardware("apple", frozenset(), False, _NO_UNIT, "docs/speed.md", "2026-11-26"),
    "volta": _nvidia("7.0", "V100"),
    "v100": _nvidia("7.0", "V100"),
    "turing": _nvidia("7.5", "T4 2080"),
    "t4": _nvidia("7.5", "T4"),
    "rtx-2080": _nvidia("7.5", "2080"),
    "ampere": _nvidia("8.0", _AMPERE),
    "a100": _nvidia("8.0", "A100"),
    "a10": _nvidia("8.6", "A10 A10G"),
    "a40": _nvidia("8.6", "A40"),
    "a6000": _nvidia("8.6", "A6000"),
    "rtx-3090": _nvidia("8.6", "3090"),
    "ada": _nvidia("8.9", _ADA),
    "l4": _nvidia("8.9", "L4"),
    "l40s": _nvidia("8.9", "L40S"),
    "rtx-4090": _nvidia("8.9", "4090"),
    "hopper": _nvidia("9.0", _HOPPER),
    "h100": _nvidia("9.0", "H100"),
    "h200": _nvidia("9.0", "H200"),
    "blackwell": _nvidia("10.0", _BLACKWELL),
    "b200": _nvidia("10.0", "B200"),
    "mi300": Hardware(
        "amd",
        frozenset({"MI300A", "MI300X"}),
        True,
        "has 2:4 through hipSPARSELt of ROCm, torch 2.9 and later",
        "pytorch#150578",
        "2026-11-22",
    ),
}
"""What `--hardware` can name: a kind of processor, a generation, a card."""


def find_hardware(name: str) -> Hardware:
    """The hardware of that name, in any case. Raises UnknownName."""
    if name.lower() not in HARDWARE:
        raise UnknownName("hardware", name, HARDWARE)
    return HARDWARE[name.lower()]


def is_measured(hardware: str | None, machine: Mapping[str, Any], runtime: str) -> bool:
    """Whether what was timed in a runtime on a machine (`machine.machine()`) was timed on that
    hardware; None: any.
    """
    if hardware is None:
        return True
    wanted, accelerated = find_hardware(hardware), runtime in ACCELERATED
    if wanted.maker == "processor":
        return not accelerated
    if wanted.maker == "apple":
        return not accelerated and str(machine["system"]).startswith("Darwin")
    return accelerated and any(
        wanted.words & set(re.split(r"\W+", name)) for name in machine["accelerators"]
    )


def place(machine: Mapping[str, Any], runtime: str) -> str:
    """Where a runtime was timed, in words."""
    if runtime in ACCELERATED:
        return ", ".join(machine["accelerators"]) or "an accelerator without a name"
    return f"{machine['processor']}, {machine['threads']} threads"
