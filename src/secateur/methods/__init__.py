"""The pruning methods, one paper a file. A new method is a file here and its line in `METHODS`.

A name may end in refinements, applied in order: `wanda+refit` is Wanda's mask with the best weights
for it, and `sweep+refit+dense-target` aims at what the dense model computes. Three lines are
presets, by what they cost: `fast` factorises nothing, `default` is about as fast as SparseGPT,
`best` takes the time it takes, and tunes each block, and all of them together where there is room.
Figures for all of them: docs/quality.md.
"""

from collections.abc import Callable, Collection

from secateur.errors import UnknownName
from secateur.methods.alps import alps
from secateur.methods.base import Method, Pruned, scored
from secateur.methods.dense_target import dense_target
from secateur.methods.magnitude import magnitude
from secateur.methods.refit import refit
from secateur.methods.ria import ria
from secateur.methods.sparsegpt import sparsegpt, sweep
from secateur.methods.swap import swap
from secateur.methods.wanda import wanda

REFINE_STEPS, DISTIL_TOKENS = 160, 2**15
_alps_fast = alps(stages=4, updates=4, first=0.1, last=2.0)
METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria(),
    "sparsegpt": sparsegpt(),
    "sweep": sweep(),
    "alps": alps(),
    "alps-fast": _alps_fast,
    "fast": refit(wanda._replace(group="matrix")),
    "default": _alps_fast,
    "best": alps(iterations=20)._replace(
        refine=REFINE_STEPS, distil=2 * DISTIL_TOKENS, distil_if_it_fits=True
    ),
}
"""Every method by name, presets last; `find_method` reads `wanda+refit` and the like."""
REFINEMENTS: dict[str, Callable[[Method], Method]] = {"refit": refit, "swap": swap}
"""What is done to a method's result, matrix by matrix."""
SWITCHES: dict[str, Callable[[Method], Method]] = {
    "sequential": lambda method: method._replace(sequential=True),
    "dense-target": dense_target,
    "permute": lambda method: method._replace(permute=True),
    "refine": lambda method: method._replace(refine=REFINE_STEPS),
    "distil": lambda method: method._replace(
        distil=max(method.distil, DISTIL_TOKENS), distil_if_it_fits=False
    ),
}
"""What the stream of blocks does for a method, whatever it is."""


def read_name(
    name: str,
    methods: Collection[str],
    refinements: Collection[str],
    method: str = "method",
    refinement: str = "refinement",
) -> tuple[str, list[str]]:
    """The method and the refinements of a name `a+b+c`; UnknownName calls what is unknown `method`
    or `refinement`.
    """
    first, *rest = name.split("+")
    if first not in methods:
        raise UnknownName(method, first, methods)
    for other in rest:
        if other not in refinements:
            raise UnknownName(refinement, other, refinements)
    return first, rest


def find_method(name: str) -> Method:
    """The method of that name, with its refinements and switches. Raises UnknownName."""
    known = REFINEMENTS | SWITCHES
    first, refinements = read_name(name, METHODS, known)
    method = METHODS[first]
    for refinement in refinements:
        method = known[refinement](method)
    return method


__all__ = ["METHODS", "REFINEMENTS", "SWITCHES", "Method", "Pruned", "find_method", "scored"]
