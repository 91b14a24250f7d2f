"""How much is removed from which site: a plan, which is data.

A plan maps full site names to patterns; a site that is missing from it stays dense.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from secateur.errors import UnknownName
from secateur.patterns import Pattern

Plan = Mapping[str, Pattern]


def uniform(shapes: Mapping[str, tuple[int, int]], pattern: Pattern, skip: Sequence[str] = ()) -> Plan:
    """The same pattern for every site but those whose name matches a glob in `skip`.

    `shapes` gives `[out, in]` of every site by full name. A glob matches the full name or its end
    (`down_proj`, `mlp.*`). Raises UnknownName for a glob that matches nothing, BadPattern where a site cannot
    hold the pattern.
    """
    left_out = {name for glob in skip for name in _matching(shapes, glob)}
    plan = {name: pattern for name in shapes if name not in left_out}
    for name in plan:
        pattern.check(shapes[name], name)
    return plan


def _matching(names: Iterable[str], glob: str) -> list[str]:
    names = list(names)
    found = [name for name in names if fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")]
    if not found:
        raise UnknownName("site that matches", glob, {name.rsplit(".", 1)[-1] for name in names})
    return found
