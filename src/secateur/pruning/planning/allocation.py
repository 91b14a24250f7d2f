"""How much is removed from which weight matrix: a plan, which is data.

A plan maps the full names of weight matrices to patterns; one that is missing from it stays dense.
It is a JSON file that can be written, read, edited and used again. Here are the rules that make one
out of numbers; `measured.py` measures them.

* `uniform`: the same for every matrix. The default: at 50 % independent audits found every other
  rule no better.
* `by_outliers`: blocks with many outliers lose less (OWL, Yin et al. 2024, arXiv:2310.05175).
* `least_error`: error curves are given, and each weight is removed where the next one costs least.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from secateur.errors import BadPattern, BadPlan, UnknownName, in_one_line
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import Pattern, Unstructured
from secateur.models.matrices import Shapes
from secateur.system.json_files import read_json, write_json

Plan = Mapping[str, Pattern]
Curve = Sequence[tuple[float, float]]
"""(sparsity, error) of rising sparsity."""
SCHEMA = "secateur.plan/1"
MOST = 0.99


def uniform(shapes: Shapes, pattern: Pattern, skip: Sequence[str] = ()) -> Plan:
    """The same pattern for every weight matrix but those whose name matches a glob in `skip`.

    `shapes` gives `[out, in]` of every matrix by full name. A glob matches the full name or its end
    (`down_proj`, `mlp.*`). Raises UnknownName for a glob that matches nothing, BadPattern where a
    matrix cannot hold the pattern.
    """
    plan = dict.fromkeys(names_left(shapes, skip), pattern)
    for name in plan:
        pattern.check(shapes[name], name)
    return plan


def names_left(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """The names that match no glob in `skip`.

    Raises UnknownName for a glob that matches nothing, BadPattern for a regular expression.
    """
    names, left_out = list(names), set[str]()
    for glob in skip:
        if glob.startswith("re:"):
            raise BadPattern(
                f"--skip takes globs such as '*.down_proj'; found the regular expression {glob!r}."
            )
        globs = (glob, f"*.{glob}")
        matching = {name for name in names if any(fnmatchcase(name, each) for each in globs)}
        if not matching:
            ends = {name.rsplit(".", 1)[-1] for name in names}
            raise UnknownName("weight matrix that matches", glob, ends)
        left_out |= matching
    return [name for name in names if name not in left_out]


def by_outliers(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """The sparsity of every block from its share of outliers among the scores (OWL, sec. 3.3).

    Linear in the share: the block with fewest outliers loses 2 · `spread` more than the one with
    most, and the mean over weights, `sizes` of them in each block, is `sparsity`. Raises BadPlan
    where a block would lose more than 99 %.
    """
    low, high = min(shares.values()), max(shares.values())
    width = max(high - low, 1e-30)
    raw = {name: -2 * spread * (share - low) / width for name, share in shares.items()}
    shift = sparsity - sum(raw[name] * sizes[name] for name in raw) / sum(sizes.values())
    return _checked({name: value + shift for name, value in raw.items()}, sparsity)


def least_error(
    curves: Mapping[str, Curve], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """The sparsities of mean `sparsity`, by `sizes`, with the least sum of errors.

    A continuous knapsack: a curve is read as the lines between the points of its lower convex hull,
    so the next weight always goes where the error grows least, and that is exact. Raises BadPlan
    where the curves do not reach `sparsity`.
    """
    ratios, pieces = {}, []
    for name, curve in curves.items():
        hull = _lower_hull(curve)
        ratios[name] = hull[0][0]
        for (start, low), (stop, high) in pairwise(hull):
            weights = (stop - start) * sizes[name]
            pieces.append(((high - low) / weights, name, weights))
    budget = sum((sparsity - ratios[name]) * sizes[name] for name in curves)
    if budget < 0 or budget > sum(weights for _, _, weights in pieces) * (1 + 1e-9):
        raise BadPlan(f"The error curves do not hold a mean sparsity of {sparsity:.1%}.")
    for _, name, weights in sorted(pieces):
        taken = min(weights, budget)
        ratios[name] += taken / sizes[name]
        budget -= taken
    return _checked(ratios, sparsity)


def _lower_hull(curve: Curve) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _checked(ratios: dict[str, float], sparsity: float) -> dict[str, float]:
    for name, ratio in ratios.items():
        if not 0 <= ratio <= MOST:
            raise BadPlan(
                f"{name} would lose {ratio:.1%} of its weights for a mean of {sparsity:.1%}; "
                f"between 0 and {MOST:.0%} is possible. Ask for another sparsity, or use "
                "--allocate uniform."
            )
    return ratios


def scaled(plan: Plan, ratios: Mapping[str, float]) -> Plan:
    """The plan with other sparsities: `ratios` by weight matrix, or by the block that its name
    begins with. Raises BadPlan for a pattern that is no percentage.
    """
    shared: dict[str, Pattern] = {}
    for name, pattern in plan.items():
        if not isinstance(pattern, Unstructured):
            raise BadPlan(
                f"{pattern} removes the same of every weight matrix; only a percentage such as "
                "'70%' can be shared out."
            )
        owner = name if name in ratios else next(b for b in ratios if name.startswith(f"{b}."))
        shared[name] = Unstructured(round(ratios[owner], 6), pattern.over)
    return shared


def sparsity_of(plan: Plan, shapes: Shapes) -> float:
    """The share of weights that the plan removes, over all matrices."""
    removed = sum(prod(shapes[name]) * pattern.sparsity for name, pattern in plan.items())
    return removed / sum(map(prod, shapes.values()))


def label(plan: Plan, shapes: Shapes) -> str:
    """The pattern that every matrix of a plan has, else their mean sparsity."""
    patterns = {str(pattern) for pattern in plan.values()}
    if len(patterns) == 1:
        return patterns.pop()
    inside = {name: shapes[name] for name in plan}
    return f"{round(100 * sparsity_of(plan, inside), 1):g}%"


def write_plan(file: Path, plan: Plan, shapes: Shapes, made: Mapping[str, Any]) -> None:
    """Write a plan as JSON. `made` says how it came about; readers leave it alone."""
    sites = {name: str(plan[name]) if name in plan else "dense" for name in shapes}
    document = {
        "schema": SCHEMA,
        "sparsity": round(sparsity_of(plan, shapes), 6),
        **made,
        "sites": sites,
    }
    write_json(file, document)


def read_plan(file: Path, shapes: Shapes) -> Plan:
    """The plan in a JSON file: `sites` gives a pattern or "dense" by the full name of a weight
    matrix; what is not named stays dense.

    Raises BadPlan for what is no plan, UnknownName for a matrix that the model does not have,
    BadPattern for a pattern that a matrix cannot hold.
    """
    try:
        document = read_json(file)
    except (OSError, ValueError) as error:
        raise BadPlan(f"{file} cannot be read as a plan: {in_one_line(error)}.") from error
    known = isinstance(document, dict) and document.get("schema") == SCHEMA
    if not known or not isinstance(document.get("sites"), dict):
        raise BadPlan(
            f"{file} is no plan: an object with schema {SCHEMA!r} and 'sites' was wanted."
        )
    plan: dict[str, Pattern] = {}
    for name, text in document["sites"].items():
        if name not in shapes and any(character in name for character in "*?["):
            raise BadPlan(
                f"{file} names {name!r}; a plan gives each weight matrix by its full name, without "
                "globs. 'secateur plan --out' writes them all, and --skip takes globs."
            )
        if name not in shapes:
            raise UnknownName("weight matrix in this model", name, shapes)
        if not isinstance(text, str):
            raise BadPlan(
                f"{file} gives {name} {text!r}; a pattern such as '70%', or 'dense', was wanted."
            )
        if text != "dense":
            plan[name] = parse_pattern(text)
            plan[name].check(shapes[name], name)
    if not plan:
        raise BadPlan(f"{file} leaves every weight matrix dense; nothing would be pruned.")
    return plan


def left_dense_in_words(plan: Plan, shapes: Shapes) -> str:
    """A sentence on the weight matrices that a plan leaves dense; empty where there are none."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in shapes if name not in plan)
    if not counts:
        return ""
    parts = [f"{name} ({count})" for name, count in counts.items()]
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return (
        f"The plan leaves {counts.total()} of {len(shapes)} weight matrices dense: "
        f"{', '.join(parts[:4])}{more}."
    )


def is_file(allocate: str) -> bool:
    """Whether this names a plan's file rather than a rule."""
    return allocate.endswith(".json")
