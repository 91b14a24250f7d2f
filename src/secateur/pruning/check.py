"""Whether a method, a pattern and their options go together, asked before any work."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import BadPattern
from secateur.methods import METHODS, find_method
from secateur.methods.patterns import parse
from secateur.methods.structures import Structure
from secateur.pruning.planning.measured import check_allocation
from secateur.pruning.structured.channel_scores import SELECTIONS
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.expert_scores import EXPERTS
from secateur.pruning.structured.method import PRESETS, check_structure


def check_method(
    method: str,
    pattern: str,
    allocate: str = "uniform",
    skip: Sequence[str] = (),
    align: int | None = None,
) -> None:
    """Raise UnknownName, BadPattern or BadPlan for a method, a pattern and options that do not go
    together.
    """
    structure, name = parse(pattern), method.split("+")[0]
    if isinstance(structure, Structure):
        if name in METHODS and name not in PRESETS:
            raise BadPattern(
                f"{name!r} chooses single weights; {structure} takes out whole structures. Say '50%' or '2:4'."
            )
        if allocate != "uniform":
            check_allocation(allocate, "50%")
        check_structure(structure, method, allocate, skip, align)
        return
    if name in {*SELECTIONS, *BLOCKS, *EXPERTS}:
        raise BadPattern(
            f"{name!r} chooses whole structures; {structure} is a pattern of zeros. Say '25% of channels'."
        )
    find_method(method)
    check_allocation(allocate, pattern)
    if align is not None:
        raise BadPattern(f"--align is for the channels of a structure; {structure} removes none.")
