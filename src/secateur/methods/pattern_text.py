"""How sparsity patterns are written; `parse` reads what `str` writes.

    50%              unstructured; the method chooses the comparison group it was published with
    50% of row       unstructured, the same count in every output row
    50% of matrix    unstructured, compared over the whole matrix
    2:4              keep 2 of every 4 consecutive inputs (NVIDIA's meaning)

What names whole channels, heads, experts or blocks is read by structures.py.
"""

import re

from secateur.errors import BadPattern
from secateur.methods.patterns import NM, Group, Pattern, Unstructured
from secateur.methods.structures import Structure, parse_structure


def parse(text: str) -> Pattern | Structure:
    """The pattern or structure that `text` names. Raises BadPattern for anything else."""
    return parse_structure(text.strip()) or parse_pattern(text)


def parse_pattern(text: str) -> Pattern:
    """The pattern of zeros that `text` names. Raises BadPattern for anything else."""
    if match := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip()):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(-?\d+(?:\.\d+)?)%(?: of (row|matrix))?", text.strip()):
        over: Group | None = match[2]  # type: ignore[assignment]
        pattern = Unstructured(float(match[1]) / 100, over)
        pattern.check((1, 1), text)
        return pattern
    if parse_structure(text.strip()):
        raise BadPattern(
            f"{text} takes out whole structures, which need no plan; a pattern of zeros is wanted "
            "here, such as '50%' or '2:4'. Structures go to 'secateur prune' as they are."
        )
    raise BadPattern(
        f"{text!r} is no sparsity pattern. Say '50%', '50% of row', '50% of matrix', 'N:M' such as "
        "'2:4', '25% of channels', '25% of heads', '25% of experts', '4 blocks', '12% of blocks', "
        "or 'to 75% of parameters'."
    )


def share_of(text: str) -> tuple[float, str] | None:
    """The share in percent that a pattern takes out and of what: "" for single weights, " of
    channels" …

    None for a pattern that is no share. Patterns with the same end form an ordered family.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%((?: of [a-z]+)?)", text)
    return (float(match[1]), match[2]) if match else None
