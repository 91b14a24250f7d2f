"""Whether a method, a pattern and their options go together, asked before any work."""

from collections.abc import Iterable
from typing import NamedTuple

from secateur.errors import BadPattern, UnknownName
from secateur.methods import METHODS, Method, find_method
from secateur.methods.pattern_text import parse
from secateur.methods.patterns import Pattern
from secateur.methods.rounding import with_values
from secateur.methods.structures import Structure
from secateur.methods.values import Values, parse_values
from secateur.models.matrices import Shapes
from secateur.pruning.planning.measured import check_allocation
from secateur.pruning.structured.channel_scores import SELECTIONS
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.expert_scores import EXPERTS
from secateur.pruning.structured.method import PRESETS, Slices, find_structure
from secateur.system.settings import Recipe

DRAFT_HEADS = ("refuse", "drop")


class Zeros(NamedTuple):
    """A recipe for zeros, with the method of the table and the pattern that it names.

    `values` are what kept weights may be, which the method sees to; None: anything.
    """

    recipe: Recipe
    method: Method
    pattern: Pattern
    values: Values | None = None

    def check_groups(self, names: Iterable[str], shapes: Shapes) -> None:
        """Raise BadPattern where the groups of values do not divide a matrix of those names."""
        if self.values is not None:
            for name in names:
                self.values.check(shapes[name], name)


def find_recipe(recipe: Recipe) -> Zeros | Slices:
    """Read a recipe: what makes zeros, or a smaller model.

    Raises UnknownName, BadPattern or BadPlan where method, pattern and options do not go together.
    """
    pattern, name = parse(recipe.pattern), recipe.method.split("+")[0]
    values = parse_values(recipe.values)
    if recipe.draft_heads not in DRAFT_HEADS:
        raise UnknownName("way with draft heads", recipe.draft_heads, DRAFT_HEADS)
    if isinstance(pattern, Structure):
        if name in METHODS and name not in PRESETS:
            raise BadPattern(
                f"{name!r} chooses single weights; {pattern} takes out whole structures. "
                "Say '50%' or '2:4'."
            )
        if recipe.allocate != "uniform":
            check_allocation(recipe.allocate, "50%")
        if recipe.keep_zeros:
            raise BadPattern(
                f"--keep-zeros is for patterns of zeros; what makes up for {pattern} fills zeros. "
                "Take out the structure first, then prune to a pattern."
            )
        if values:
            raise BadPattern(
                f"--values is for patterns of zeros, 0% among them; {pattern} takes out whole "
                f"structures. Take them out first, then prune the result to 0% with {values}."
            )
        return Slices(recipe, find_structure(pattern, recipe), pattern)
    if name in {*SELECTIONS, *BLOCKS, *EXPERTS}:
        raise BadPattern(
            f"{name!r} chooses whole structures; {pattern} is a pattern of zeros. "
            "Say '25% of channels'."
        )
    method = find_method(recipe.method)
    check_allocation(recipe.allocate, recipe.pattern)
    if recipe.align is not None:
        raise BadPattern(f"--align is for the channels of a structure; {pattern} removes none.")
    if recipe.draft_heads == "drop":
        raise BadPattern(
            f"--draft-heads drop is for structures; {pattern} leaves them as they are."
        )
    return find_zeros(recipe, method, pattern, values)


def find_zeros(recipe: Recipe, method: Method, pattern: Pattern, values: Values | None) -> Zeros:
    """The recipe, with a method that leaves the `values` that are wanted. Raises BadPattern."""
    if values is not None:
        method = with_values(method, values, alone=not pattern.sparsity)
    return Zeros(recipe, method, pattern, values)
