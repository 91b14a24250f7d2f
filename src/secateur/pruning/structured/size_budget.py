"""What to take out so that a model becomes as small as asked: `to 75% of parameters`, `to 6GB`.

No more than is needed, and in this order: up to half of the experts, which are most of a mixture's
parameters; up to half of the feed-forward channels, which cost least quality for each parameter
(docs/structured.md) and come in the finest steps, so that they end on the size; up to a quarter of
the blocks; half of the heads.
"""

from math import ceil
from typing import NamedTuple

from secateur.errors import BadPattern, UnsupportedModel
from secateur.methods.structures import (
    Budget,
    Depth,
    Kind,
    Several,
    Structure,
    Units,
    default_alignment,
)
from secateur.pruning.structured.feasibility import (
    Feasibility,
    block_parameters,
    blocks_for_pictures,
)

MOST, MOST_BLOCKS = 0.5, 0.25


class _Half(NamedTuple):
    """Half of the units of a kind: their parameters, and of how many in a block how many go."""

    parameters: int
    total: int
    removed: int

    def reaching(self, parameters: float, step: int) -> int:
        """The fewest units in steps of `step` that hold so many parameters, or all that may go."""
        needed = max(parameters, 0) * self.removed / self.parameters
        return min(self.removed, step * ceil(needed / step))


def within_budget(
    feasibility: Feasibility, structure: Structure, size: int, align: int | None
) -> Structure:
    """For a budget, what leaves at most that of a model whose weights are `size` bytes; any other
    structure as it is. Raises BadPattern.
    """
    if not isinstance(budget := structure, Budget):
        return structure
    language_model = feasibility.language_model
    total, count = language_model.model.num_parameters(), len(language_model.blocks)
    share = budget.share if budget.share is not None else (budget.bytes or 0) / size
    if share >= 1:
        raise BadPattern(f"The model has {size:,} bytes of weights already; {budget} was asked.")
    missing, chosen = total * (1 - share), list[Units | Depth]()
    kinds: tuple[Kind, ...] = ("experts", "channels", "heads")
    halves = {of: _half(feasibility, of, align) for of in kinds}
    experts, channels, heads = halves.values()
    if experts:
        taken = experts.reaching(missing, 1)
        chosen.append(Units(taken / experts.total, "experts"))
        missing -= taken / experts.removed * experts.parameters
    per_block = (block_parameters(language_model) - (total * (1 - share) - missing)) / count
    first = min(max(1, blocks_for_pictures(language_model)), count - 1)
    blocks = int(MOST_BLOCKS * count) if feasibility.holds([first]) else 0
    for half_of_heads in (None, heads):
        for fewer in range(blocks + 1):
            left = (count - fewer) / count  # of everything that is taken out of each block
            wanted = missing - fewer * per_block
            if half_of_heads:
                wanted -= half_of_heads.parameters * left
            if wanted > (channels.parameters * left if channels else 0):
                continue
            if fewer:
                chosen.append(Depth(count=fewer))
            if half_of_heads:
                chosen.append(Units(half_of_heads.removed / half_of_heads.total, "heads"))
            step = align or default_alignment(channels.total) if channels else 1
            if channels and (taken := channels.reaching(wanted / left, step)):
                chosen.append(Units(taken / channels.total, "channels"))
            return chosen[0] if len(chosen) == 1 else Several(tuple(chosen))
    known = [of for of, half in halves.items() if half] or ["nothing"]
    raise BadPattern(
        f"{budget} is out of reach: for a size at most half of the {' and '.join(known)} are taken "
        f"and {blocks} of {count} blocks. Say what should go, such as '60% of channels' or '50% of "
        "blocks'."
    )


def _half(feasibility: Feasibility, of: Kind, align: int | None) -> _Half | None:
    """What half of a kind of unit would be; None where they cannot go."""
    try:
        removal = feasibility.removal(Units(MOST, of), align)
    except UnsupportedModel:
        return None
    except BadPattern:
        if of == "channels" and align:
            raise
        return None
    choices = [choice for block in removal.kinds.values() for choice in block.values()]
    most = max((choice.total, choice.removed) for choice in choices)
    parameters = block_parameters(feasibility.language_model)
    return _Half(parameters - block_parameters(removal.smaller), *most)
