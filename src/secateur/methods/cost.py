"""What a method costs: matrix operations and working memory as closed formulas in a matrix's shape.

Each method states its own beside its code (`Method.cost`), and refinements carry it along.
`bench/cost.py` and the tests count the operations of every method while it runs and fail where the
formula says otherwise.

A multiplication and an addition count as two operations; triangular solves and inverses as
executed, with no use made of zeros. Not counted: passes over the elements of a matrix, such as
scores, thresholds and masks.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTH = 128
"""Columns of a block of a sweep."""
EVERY_COLUMN = 2**62
"""More columns than a matrix has."""


class Cost(NamedTuple):
    """What a method does to a weight matrix `[out, in]`, or to a stack that reads the same input.

    `products` `[out, in] × [in, in]`; `inverses` of `[in, in]` by Cholesky; `sweeps` over the
    columns; `factors`, Cholesky and what sweeps need of it, made once for all that read the same
    input. Rounding has `block_sweeps`, each over the columns of a block of `WIDTH` alone, and fits
    the scales of groups of so many inputs, `fitted`.

    Memory at the worst moment: `matrices` of `[out, in]` and `squares` of `[in, in]` float32, the
    result and `kept` included, but not the weights that came in; `kept` squares stay until the
    statistics go. Measured (anonymous memory with MALLOC_MMAP_THRESHOLD_=65536, shapes from 704 ×
    2048 to 2816 × 1024, patterns 50% and 2:4; a plane through it leaves at most 19 %), rounded up.
    """

    products: int = 0
    inverses: int = 0
    sweeps: int = 0
    factors: int = 0
    block_sweeps: int = 0
    fitted: int = 0
    matrices: float = 4
    squares: float = 0
    kept: int = 0

    def of_matrix(self, rows: int, columns: int) -> float:
        """Operations of one matrix, without what matrices share."""
        in_blocks = sum(width * (width - 1) for _, width in _blocks(columns))
        return (
            self.products * 2 * rows * columns**2
            + self.inverses * columns**3  # Cholesky ⅓, inverse ⅔
            + self.sweeps * rows * columns * (columns - 1)  # every column updates all later ones
            + self.block_sweeps * rows * in_blocks
            + 2 * rows * columns * min(self.fitted, columns)  # with the square of each group
        )

    def shared(self, columns: int) -> float:
        """Operations for all matrices with the same inputs."""
        # a triangular solve and a product for each
        responses = sum(width**3 + 2 * start * width**2 for start, width in _blocks(columns))
        return self.factors * (columns**3 / 3 + responses)

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Working memory for one matrix."""
        return round(4 * (self.matrices * rows * columns + self.squares * columns**2))

    def kept_bytes(self, columns: int) -> int:
        """What stays with the statistics of an input."""
        return 4 * self.kept * columns**2

    def followed_by(self, products: int) -> Cost:
        """The cost of this method and then of a solver with so many products."""
        return self._replace(
            products=self.products + products,
            matrices=max(self.matrices + 1, 12),
            squares=max(self.squares, 3),
            kept=max(self.kept, 1),
        )


def _blocks(columns: int) -> list[tuple[int, int]]:
    """The first column of every block, and how many it has."""
    return [(start, min(WIDTH, columns - start)) for start in range(0, columns, WIDTH)]


def refit_products(iterations: int) -> int:
    """Products of a refit: target, first residual, one an iteration, objective at the end."""
    return iterations + 3
