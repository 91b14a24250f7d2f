"""Names of hardware as people say them: what has sparse tensor cores, and whether a machine that
was measured is it.

What is known of them stands in `deployment/sparsity_support.toml`. A name is matched with what
torch calls an accelerator, by whole words, so that a card that is not in the file counts as not
measured, never as another one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.deployment.sparsity_support import KNOWN, RUNTIME_FACTS
from secateur.errors import UnknownName

ACCELERATED = tuple(name for name, facts in RUNTIME_FACTS.items() if facts.accelerated)
"""The runtimes that are timed on an accelerator; the others run on the processor."""


@dataclass(frozen=True)
class Hardware:
    """What a name means.

    `maker` is processor, apple, nvidia or amd; `words` are what the names of such devices hold.
    `two_of_four` says that it multiplies 2:4 matrices by hardware of its own, `says` in words what
    it has for them.
    """

    maker: str
    says: str
    source: str
    date: str
    words: str = ""
    two_of_four: bool = False


def _nvidia(capability: str, words: str) -> Hardware:
    """A generation of NVIDIA's, or a card of it."""
    facts = KNOWN["sparse_tensor_cores"]
    since = facts["since"]
    if has := float(capability) >= since:
        cores = "and with it sparse tensor cores"
    else:
        cores = f"no sparse tensor cores: those came with {since}, Ampere"
    says = f"has compute capability {capability}, {cores}"
    return Hardware("nvidia", says, facts["source"], facts["date"], words, has)


HARDWARE: Mapping[str, Hardware] = {
    **{name: Hardware(**entry) for name, entry in KNOWN["hardware"].items()},
    **{name: _nvidia(**entry) for name, entry in KNOWN["nvidia"].items()},
}
"""What `--hardware` can name: a kind of processor, a generation, a card."""


def find_hardware(name: str) -> Hardware:
    """The hardware of that name, in any case. Raises UnknownName."""
    if name.lower() not in HARDWARE:
        raise UnknownName("hardware", name, HARDWARE)
    return HARDWARE[name.lower()]


def is_measured(hardware: str | None, machine: Mapping[str, Any], runtime: str) -> bool:
    """Whether timings in a runtime on a machine (`machine.machine()`) count for that hardware;
    None: all do.
    """
    if hardware is None:
        return True
    wanted, accelerated = find_hardware(hardware), runtime in ACCELERATED
    if wanted.maker == "processor":
        return not accelerated
    if wanted.maker == "apple":
        return not accelerated and str(machine["system"]).startswith("Darwin")
    words = set(re.split(r"\W+", " ".join(machine["accelerators"])))
    return accelerated and not words.isdisjoint(wanted.words.split())


def timed_on(machine: Mapping[str, Any], runtime: str) -> str:
    """Where a runtime was timed, in words."""
    if runtime in ACCELERATED:
        return ", ".join(machine["accelerators"]) or "an accelerator without a name"
    return f"{machine['processor']}, {machine['threads']} threads"
