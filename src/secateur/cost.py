"""What a method costs: matrix operations and working memory as closed formulas in a site's shape, and passes.

The one table of them. `bench/cost.py` and the tests count the operations of every method while it runs
and fail where the formula says otherwise; a new method is its line in `COSTS`. How often tokens go through a block
needs no table: it follows from what the method says of itself.

A multiplication and an addition count as two operations; triangular solves and inverses as executed, with no use
made of zeros. Not counted: passes over the elements of a matrix, such as scores, thresholds and masks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from secateur.methods import Method, find_method
from secateur.stats import OF_DENSE

Mode = Literal["one", "two"]
MODES: tuple[Mode, ...] = ("one", "two")
WIDTH = 128
"""Columns of a block of a sweep."""


class Cost(NamedTuple):
    """What a method does to one site `[out, in]`, or to several that read the same input, on top of each other.

    `products` `[out, in] × [in, in]`; `inverses` of `[in, in]` by Cholesky; `sweeps` over the columns; `factors`,
    Cholesky and what sweeps need of it, made once for all that read the same input; `targets`, how many of the products
    are made a second time for dense inputs.

    Memory at the worst moment: `matrices` of `[out, in]` and `squares` of `[in, in]` float32, the result and `kept`
    included, but not the weights that came in; `kept` squares stay until the statistics go. Measured (anonymous
    memory with MALLOC_MMAP_THRESHOLD_=65536, shapes from 704 × 2048 to 2816 × 1024, patterns 50% and 2:4; a plane
    through it leaves at most 19 %), rounded up.
    """

    products: int = 0
    inverses: int = 0
    sweeps: int = 0
    factors: int = 0
    targets: int = 0
    matrices: float = 4
    squares: float = 0
    kept: int = 0

    def site(self, rows: int, columns: int) -> float:
        """Operations of one matrix, without what matrices share."""
        return (
            self.products * 2 * rows * columns**2
            + self.inverses * columns**3  # Cholesky ⅓, inverse ⅔
            + self.sweeps * rows * columns * (columns - 1)  # every column updates all later ones
        )

    def shared(self, columns: int) -> float:
        """Operations for all matrices with the same inputs."""
        blocks = [(start, min(WIDTH, columns - start)) for start in range(0, columns, WIDTH)]
        responses = sum(width**3 + 2 * start * width**2 for start, width in blocks)  # a triangular solve, a product
        return self.factors * (columns**3 / 3 + responses)

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Working memory for one matrix."""
        return round(4 * (self.matrices * rows * columns + self.squares * columns**2))

    def kept_bytes(self, columns: int) -> int:
        """What stays with the statistics of an input."""
        return 4 * self.kept * columns**2


def _refit(iterations: int) -> int:
    """Products of a refit: the target, the first residual, one an iteration, the objective at the end."""
    return iterations + 3


def _alps(stages: int, updates: int, iterations: int) -> Cost:
    return Cost(stages * updates + _refit(iterations), stages, targets=1, matrices=12, squares=3, kept=1)


COSTS = {
    "magnitude": Cost(),
    "wanda": Cost(),
    "ria": Cost(matrices=5),
    "sparsegpt": Cost(sweeps=1, factors=1, matrices=3, squares=4, kept=1),
    "sweep": Cost(products=1, sweeps=1, factors=1, targets=1, matrices=5.5, squares=3, kept=2),
    "alps": _alps(16, 2, 10),
    "alps-fast": _alps(4, 4, 10),
}
"""The closed formula of every method, without refinements."""
PRESETS = {"fast": "wanda+refit", "default": "alps-fast", "best": "alps+dense-target"}
"""What the presets are, for counting."""
SWAPS = 100
"""Exchanges of `+swap` in each row, one product each: at most, it stops when none helps."""


def cost(name: str) -> Cost:
    """The cost of a method with its refinements, as `find_method` reads the name. Raises UnknownName."""
    find_method(name)
    first, *refinements = name.split("+")
    base, *more = PRESETS.get(first, first).split("+")
    found, updates = COSTS[base], find_method(base).updates
    if first == "best":
        found = _alps(16, 2, 20)
    for refinement in (*more, *refinements):
        if refinement == "refit":
            found = _wider(found, _refit(10 if updates else 20))
            updates = True
        elif refinement == "swap":
            found = _wider(found, SWAPS + 1)
    if OF_DENSE.intersection(find_method(name).need):
        found = found._replace(products=found.products + found.targets)
    return found


def _wider(found: Cost, products: int) -> Cost:
    """A method followed by another solver, which works in coordinates of its own."""
    return found._replace(
        products=found.products + products, targets=found.targets + 1, matrices=max(found.matrices + 1, 12),
        squares=max(found.squares, 3), kept=max(found.kept, 1),
    )  # fmt: skip


class Passes(NamedTuple):
    """How often tokens go through a block; the backward half of a step of `+refine` counts as two.

    `whole`, all calibration windows; `first`, the first batch alone; `after`, all windows through the finished
    block, for the inputs of the next one: the last block has none.
    """

    whole: int
    first: int
    after: int

    def windows(self, samples: int, batch_size: int, last: bool) -> int:
        """Windows through one block."""
        return (self.whole + (0 if last else self.after)) * samples + self.first * min(samples, batch_size)


def passes(method: Method, groups: int, mode: Mode) -> Passes:
    """The passes through a block whose sites fall into `groups`, where those of a group read the same input.

    `two`: one pass looks and the next goes on; a method that is `sequential` looks at every group. `one`: the block
    runs once, all batches waiting at each group until it is solved.
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
    """Operations of attention for shapes `[batch, heads, tokens, width]`: scores, and the sum of the values."""
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * k[-2] * (width + v[-1])
