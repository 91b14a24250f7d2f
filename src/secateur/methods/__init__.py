"""The pruning methods, one paper a file. A new method is a file here and its line in `METHODS`."""

from secateur.errors import UnknownName
from secateur.methods.base import Method, Pruned, scored
from secateur.methods.magnitude import magnitude
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda

METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt(),
}


def find_method(name: str) -> Method:
    """The method of that name. Raises UnknownName."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Method", "Pruned", "find_method", "scored"]
