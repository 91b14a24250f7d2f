"""What can run a model, a file each. A new runtime is a file here and its line in `RUNTIMES`.

A runtime says why it is not available on this machine, loads a checkpoint folder, and gives something that can prefill
and decode; the clock, the rounds and the comparison of outputs are in `bench`.
"""

from secateur.errors import UnknownName
from secateur.runtimes.base import Running, Runtime
from secateur.runtimes.eager import eager
from secateur.runtimes.packed import own_dense, own_int8, packed, packed_int8
from secateur.runtimes.semi_structured import eager_cuda, semi_structured

RUNTIMES: dict[str, Runtime] = {
    "eager": eager,
    "packed": packed,
    "packed-int8": packed_int8,
    "own-dense": own_dense,
    "own-int8": own_int8,
    "semi-structured": semi_structured,
    "eager-cuda": eager_cuda,
}


def find_runtime(name: str) -> Runtime:
    """The runtime of that name. Raises UnknownName for one that does not exist, or is not available here."""
    if name not in RUNTIMES:
        raise UnknownName("runtime", name, RUNTIMES)
    return RUNTIMES[name]


__all__ = ["RUNTIMES", "Running", "Runtime", "find_runtime"]
