"""`+refit`: keep a method's mask, and make the kept weights the best ones for it.

Masked conjugate gradients from the method's own weights (`least_squares.masked_least_squares`): ten
iterations where the method has updated its weights already, twenty where it only chose a mask.
Composes with every method.
"""

from torch import Tensor

from secateur.methods.base import Method, Pruned
from secateur.methods.cost import refit_products
from secateur.methods.least_squares import masked_least_squares, normalise
from secateur.methods.patterns import Pattern
from secateur.methods.statistics import Stats


def refit(method: Method, iterations: int | None = None) -> Method:
    """The method, then `iterations` of conjugate gradients (default 10 or 20, see above)."""
    steps = iterations or (10 if method.updates else 20)

    def prune(weight: Tensor, stats: Stats, pattern: Pattern) -> Pruned:
        pruned = method.prune(weight, stats, pattern)
        problem = normalise(weight, stats)
        start = pruned.weight * problem.scale * problem.alive
        solution = masked_least_squares(problem, pruned.kept, start, steps)
        return pruned._replace(weight=problem.restore(solution, pruned.kept, weight))

    cost = method.cost and method.cost.followed_by(refit_products(steps))
    return method._replace(
        need=method.need | {"gram"}, prune=prune, updates=True, cost=cost, on_grid=None
    )
