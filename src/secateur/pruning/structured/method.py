"""Methods for structures: what chooses the parts that go, and what makes up for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from secateur.errors import BadPattern, BadPlan, UnknownName
from secateur.methods import REFINE_STEPS, read_name
from secateur.methods.structures import Budget, Depth, Structure, Units, parts
from secateur.pruning.structured.channel_scores import SELECTIONS
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.expert_scores import EXPERTS
from secateur.system.settings import Recipe

BEST = {"channels": "obs", "heads": "obs", "experts": "reap", "blocks": "kl"}
PRESETS: dict[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "fast": (
        {"channels": "energy", "heads": "energy", "experts": "reap", "blocks": "influence"},
        ("repair",),
    ),
    "default": (BEST, ("repair", "dense-target")),
    "best": (BEST, ("repair", "dense-target", "refine")),
}
"""Selections by kind of unit and suffixes of a preset; figures in docs/structured.md."""
SUFFIXES = ("repair", "dense-target", "refine")


class StructuredMethod(NamedTuple):
    """A structured method: how it is chosen what of each kind goes, and what makes up for it.

    `reconstruct`: what reads the channels is fitted anew by least squares; `dense_target`: to what
    the dense model gives; `refine`: steps of tuning the block as a whole.
    """

    selections: Mapping[str, str]
    reconstruct: bool
    dense_target: bool
    refine: int = 0

    @property
    def merges(self) -> bool:
        """Whether experts that go are merged into others."""
        return self.selections.get("experts") == "ream"

    @property
    def second_stream(self) -> bool:
        """Whether what the dense model gives is wanted beside what the smaller one gives."""
        return self.dense_target or self.refine > 0


class Slices(NamedTuple):
    """A recipe for a smaller model, with the method and the structure that it names."""

    recipe: Recipe
    method: StructuredMethod
    structure: Structure


def find_structured_method(name: str, structure: Structure) -> StructuredMethod:
    """The structured method of that name for a structure. Raises UnknownName.

    A selection and suffixes: `energy`, `obs+repair`, `kl+repair+dense-target+refine`; or one of
    `PRESETS`. In a structure of several kinds, those that a selection does not know are selected as
    by default.
    """
    tables: dict[str, Mapping[str, Any]] = {
        "channels": SELECTIONS,
        "heads": SELECTIONS,
        "experts": EXPERTS,
        "blocks": BLOCKS,
    }
    kinds = ["blocks" if isinstance(part, Depth) else part.of for part in parts(structure)] or list(
        tables
    )
    known = {*PRESETS, *(selection for kind in kinds for selection in tables[kind])}
    first, suffixes = read_name(
        name, known, SUFFIXES, f"method for {structure}", "refinement of a structured method"
    )
    for suffix in suffixes if kinds == ["experts"] else ():
        if suffix in ("repair", "dense-target"):
            raise UnknownName(
                f"refinement for {structure}, where no matrix reads what goes,", suffix, ("refine",)
            )
    otherwise, more = PRESETS.get(first, (BEST, ()))
    chosen = {kind: first if first in tables[kind] else otherwise[kind] for kind in kinds}
    suffixes = [*suffixes, *more]
    dense, refine = "dense-target" in suffixes, REFINE_STEPS if "refine" in suffixes else 0
    return StructuredMethod(chosen, dense or "repair" in suffixes, dense, refine)


def find_structure(structure: Structure, recipe: Recipe) -> StructuredMethod:
    """The method of a recipe for a structure.

    Raises UnknownName, BadPlan or BadPattern for options that do not go with it.
    """
    method = find_structured_method(recipe.method, structure)
    allocate, skip, align = recipe.allocate, recipe.skip, recipe.align
    whole = {type(part) for part in parts(structure)} == {Depth}
    same = "out whole blocks" if whole else "the same out of every block"
    if allocate != "uniform":
        why = "" if whole else ", since stock configurations hold nothing else"
        raise BadPlan(
            f"{structure} takes {same}{why}; --allocate {allocate} needs a percentage such as "
            "'70%'."
        )
    channels = isinstance(structure, Budget) or any(
        isinstance(p, Units) and p.of == "channels" for p in parts(structure)
    )
    if align is not None and not channels:
        raise BadPattern(f"--align {align} is for channels, and {structure} removes none.")
    if skip:
        raise BadPattern(
            f"{structure} takes {same}, so --skip {skip[0]} cannot leave one matrix out."
        )
    return method
