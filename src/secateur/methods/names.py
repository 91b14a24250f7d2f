"""Names with parts: a method, or a way to choose structures, and what refines it."""

from collections.abc import Collection

from secateur.errors import UnknownName


def read_name(
    name: str,
    methods: Collection[str],
    refinements: Collection[str],
    method: str = "method",
    refinement: str = "refinement",
) -> tuple[str, list[str]]:
    """The method and the refinements that `a+b+c` names. Raises UnknownName for what is in neither
    table, which it calls `method` or `refinement`.
    """
    first, *rest = name.split("+")
    if first not in methods:
        raise UnknownName(method, first, methods)
    for other in rest:
        if other not in refinements:
            raise UnknownName(refinement, other, refinements)
    return first, rest
