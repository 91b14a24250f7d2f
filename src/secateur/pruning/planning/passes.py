"""How often tokens go through a block, which follows from what a method says of itself, and what
attention costs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from secateur.methods import Method
from secateur.methods.statistics import OF_DENSE

Mode = Literal["one", "two"]
MODES: tuple[Mode, ...] = ("one", "two")


class Passes(NamedTuple):
    """How often tokens go through a block; the backward half of a step of `+refine` counts as two.

    `whole`, all calibration windows; `first`, the first batch alone; `after`, all windows through
    the finished block, for the inputs of the next one: the last block has none.
    """

    whole: int
    first: int
    after: int

    def windows(self, samples: int, batch_size: int, last: bool) -> int:
        """Windows through one block."""
        return (self.whole + (0 if last else self.after)) * samples + self.first * min(
            samples, batch_size
        )


def passes(method: Method, groups: int, mode: Mode) -> Passes:
    """The passes through a block whose sites fall into `groups`, where those of a group read the
    same input.

    `two`: one pass looks and the next goes on; a method that is `sequential` looks at every group.
    `one`: the block runs once, all batches waiting at each group until it is solved.
    """
    dense = needs_dense(method)
    tuning = 2 + 3 * method.refine if method.refine else 0
    if mode == "one":
        return Passes(1 + dense + tuning, 0, 1 if method.refine else 0)
    turns = groups if method.sequential else 1
    crossed = not OF_DENSE.isdisjoint(method.need)
    return Passes(
        whole=(turns * (1 + crossed) if method.need else 0) + (tuning + 1 if method.refine else 0),
        first=0 if method.need else turns,
        after=1 + (dense and not method.refine),
    )


def needs_dense(method: Method) -> bool:
    """Whether the calibration tokens go through the dense model as well."""
    return not OF_DENSE.isdisjoint(method.need) or method.refine > 0


def attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Operations of attention for shapes `[batch, heads, tokens, width]`: scores, and the sum of
    the values.
    """
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * k[-2] * (width + v[-1])
