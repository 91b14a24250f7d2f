"""The pictures of a comparison, as SVG that needs nothing from outside: Vega-Lite specifications,
drawn once here.

Colours are variables of the page (`--c1` … and `currentColor`), so one picture does for light and
dark. Whoever points at a mark reads what it is. Kinds of sparsity differ in shape as well as in
colour.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from xml.etree import ElementTree

from secateur.evaluation.report.tables import fastest, method, number, text_name
from secateur.evaluation.report.vega import draw
from secateur.evaluation.results.schema import KINDS, Results, Row
from secateur.methods.pattern_text import share_of
from secateur.methods.values import AS_STORED

COLOURS = [f"var(--c{number})" for number in range(1, 9)]
"""The first is that of the dense model."""
SHAPES = ("diamond", "circle", "square", "triangle-up", "cross")
SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 440, 280
INK = {"labelColor": "currentColor", "titleColor": "currentColor"}
FONT = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
LINES = dict.fromkeys(("gridColor", "domainColor", "tickColor"), "var(--line)")
BELOW = {"orient": "bottom", "columns": 4, "symbolStrokeColor": "currentColor"}
LOOK = {
    "view": {"stroke": None},
    "axis": {**INK, **FONT, **LINES, "labelOverlap": "greedy"},
    "legend": {**INK, **FONT, **BELOW},
    "header": {**INK, "labelFontSize": 13},
    "text": {"color": "currentColor"},
    "rule": {"color": "currentColor"},
}
LETTER = 6, 13
"""Pixels that a letter of a label is wide, and a line of it high."""
DASHED = {"strokeDash": [4, 3]}
Spec = dict[str, Any]
"""A piece of a Vega-Lite specification."""


@dataclass(frozen=True)
class Chart:
    """A picture: its heading, what it shows in words for those who do not see it, and the SVG."""

    title: str
    words: str
    svg: str


class Plan(NamedTuple):
    """A picture that is yet to be drawn."""

    title: str
    words: str
    specification: Spec


class Scale(NamedTuple):
    """Something that rows are compared by: the words of its axis and of a title, the value of a
    row, None where it was not measured, and whether less of it is better.
    """

    axis: str
    title: str
    of: Callable[[Row], float | None]
    less: bool = True


def _speed(row: Row) -> float | None:
    best = fastest(row)
    return best["tokens_per_second"] if best else None


def _accuracy(row: Row) -> float | None:
    return 100 * row.tasks["mean"]["accuracy"] if "mean" in row.tasks else None


PERPLEXITY = Scale("perplexity", "Perplexity", lambda row: row.perplexity)
ACCURACY = Scale("accuracy on tasks, %", "Accuracy on tasks", _accuracy, less=False)
BYTES = Scale("bytes on disk, MiB", "size", lambda row: row.disk_bytes / 2**20)
SPEED = Scale("tokens/s where measured", "measured speed", _speed, less=False)


def charts(results: Results) -> list[Chart]:
    """Every picture that a comparison has the figures for. Raises NotDrawn."""
    drawable = (
        _against(results, PERPLEXITY, BYTES),
        _against(results, ACCURACY, BYTES),
        _against(results, PERPLEXITY, SPEED),
        _effort(results),
        _sweep(results),
        _draws(results),
        *_layers(results),
    )
    plans = [plan for plan in drawable if plan]
    drawn = draw([plan.specification for plan in plans]) if plans else []
    return [
        Chart(plan.title, plan.words, _described(svg, f"{plan.title}. {plan.words}"))
        for plan, svg in zip(plans, drawn, strict=True)
    ]


def front(points: list[tuple[float, float]], *, least: bool) -> list[int]:
    """The Pareto front by x: points (x, y) that none beats in both. `least`: less x is better, as
    less y is.
    """
    best: list[int] = []
    sign = 1 if least else -1
    for i in sorted(range(len(points)), key=lambda i: (sign * points[i][0], points[i][1])):
        if not best or points[i][1] < points[best[-1]][1]:
            best.append(i)
    return sorted(best, key=lambda i: points[i][0])


def _against(results: Results, quality: Scale, cost: Scale) -> Plan | None:
    """Quality against a cost, with the Pareto front; a mark's shape is its kind of sparsity."""
    known = [(row, cost.of(row), quality.of(row)) for row in results.table]
    points = [(row, x, y) for row, x, y in known if x is not None and y is not None]
    if len(points) < 3 or len({x for _, x, _ in points}) < 2:
        return None
    rows, log = (
        [row for row, _, _ in points],
        quality is PERPLEXITY and _wide([row for row, _, _ in points]),
    )
    sign = 1 if quality.less else -1
    best = front([(x, sign * y) for _, x, y in points], least=cost.less)
    labels = _labels(rows)
    shown = _apart([(x, math.log(y) if log else y) for _, x, y in points], labels, best)
    values = [
        {
            "x": x,
            "y": y,
            "kind": row.kind,
            "name": labels[i] if i in shown else "",
            "words": f"{method(row)} {row.pattern}, {row.kind}: "
            f"{quality.axis} {number(y)}, {x:.4g} {cost.axis}",
            "front": i in best,
        }
        for i, (row, x, y) in enumerate(points)
    ]
    place = {"x": _axis("x", cost.axis), "y": _axis("y", quality.axis, log=log)}
    kinds = {"domain": list(KINDS), "range": list(SHAPES)}
    look = {
        "color": _colour("kind", list(KINDS), 0),
        "shape": {"field": "kind", "type": "nominal", "scale": kinds},
    }
    name = {**place, "text": {"field": "name"}}
    on_front = {"transform": [{"filter": "datum.front"}]}
    layers = [
        _layer("line", place, color="currentColor", **DASHED, opacity=0.7) | on_front,
        _points(place | look, 110),
        _layer("text", name, align="left", dx=8, dy=-6, fontSize=11) | on_front,
    ]
    names = ", ".join(f"{method(rows[i])} {rows[i].pattern}".removesuffix(" -") for i in best)
    words = f"None is better in both than: {names}."
    return _plan(f"{quality.title} against {cost.title}", words, {"layer": layers}, values)


def _labels(rows: list[Row]) -> list[str]:
    """What rows are called in a picture: what they all have in common is left out."""
    ways = [method(replace(row, values=AS_STORED)) for row in rows]
    alike = len({way for way, row in zip(ways, rows, strict=True) if row.kind != "dense"}) == 1
    grids = Counter(values.split(" of ")[0] for values in {row.values for row in rows})
    labels = []
    for way, row in zip(ways, rows, strict=True):
        if row.kind == "dense":
            labels.append(way)
            continue
        grid = row.values.split(" of ")[0]
        values = "" if row.values == AS_STORED else grid if grids[grid] == 1 else row.values
        labels.append(" ".join(filter(None, ("" if alike else way, row.pattern, values))))
    return labels


def _apart(places: list[tuple[float, float]], labels: list[str], chosen: list[int]) -> list[int]:
    """Those of the `chosen` points whose labels do not lie over one another, the first ones."""
    wide, high = (max(axis) - min(axis) or 1.0 for axis in zip(*places, strict=True))
    shown: list[int] = []
    for i in chosen:
        over = [
            j
            for j in shown
            if abs(places[i][1] - places[j][1]) / high * HEIGHT < LETTER[1]
            and abs(places[i][0] - places[j][0]) / wide * WIDTH < LETTER[0] * len(labels[j])
        ]
        shown += [] if over else [i]
    return shown


def _sweep(results: Results) -> Plan | None:
    """Perplexity over the share that is taken out, a curve a method, a panel a kind of share."""
    values, families, dense = [], defaultdict(set), results.dense.perplexity
    for row in results.rows:
        share = share_of(row.pattern)
        if share and not row.calibration:
            family = f"share{share[1] or ' of single weights'}"
            families[family].add(share[0])
            values.append(
                {
                    "x": share[0],
                    "y": row.perplexity,
                    "method": method(row),
                    "of": family,
                    "low": dense + row.delta_interval[0],
                    "high": dense + row.delta_interval[1],
                    "words": f"{method(row)} {row.pattern}: perplexity {number(row.perplexity)}",
                }
            )
    values = [value for value in values if len(families[value["of"]]) >= 3]
    if not values:
        return None
    y = _axis("y", "perplexity", log=True)
    place = {"x": _axis("x", "taken out, %"), "y": y, "color": _colour("method", _methods(results))}
    bar = {**place, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
    layers = [_layer("line", place), _layer("rule", bar), _points(place, 50)]
    words = f"Dense: {number(dense)}. Bars: 95 % intervals of the difference."
    if results.tolerance:
        share = results.tolerance["share"]
        words += f" Dashed: {100 * share:.3g} % more than dense."
        layers.append(_layer("rule", {"y": {"datum": dense * (1 + share)}}, **DASHED))
    spec = _facets(layers, "of", values)
    return _plan("Perplexity by how much is taken out", words, spec, values)


def _effort(results: Results) -> Plan | None:
    """Perplexity against what it took to prune, and to fine-tune: a panel a pattern."""
    rows = [row for row in results.table if row.took]
    panels = Counter(row.pattern for row in rows)
    values = [
        {
            "x": row.took,
            "y": row.perplexity,
            "method": method(row),
            "pattern": row.pattern,
            "words": f"{method(row)} {row.pattern}: perplexity {number(row.perplexity)}, "
            f"{row.took:.3g} seconds",
        }
        for row in rows
        if panels[row.pattern] >= 3
    ]
    if not values:
        return None
    log = _wide(rows)
    x, y = _axis("x", "seconds", log=True), _axis("y", "perplexity", log=log)
    place = {"x": x, "y": y, "color": _colour("method", _methods(results))}
    words = f"Dense: {number(results.dense.perplexity)}. What pruning and fine-tuning took, "
    words += "without reading, writing and evaluating."
    spec = _facets([_points(place, 90)], "pattern", values)
    return _plan("Perplexity against what it took", words, spec, values)


def _draws(results: Results) -> Plan | None:
    """Perplexity by the size of the calibration text: a mark a draw, a line through their means."""
    drawn = {row.name for row in results.rows if row.calibration}
    values = []
    for row in results.rows:
        exact = row.values == "as stored" and not row.searched
        if row.name not in drawn or row.calibration is None or not exact:
            continue
        text = results.calibrations[row.calibration]
        values.append(
            {
                "x": text["samples"],
                "y": row.perplexity,
                "method": method(row),
                "pattern": row.pattern,
                "text": text_name(text),
                "words": f"{method(row)} {row.pattern}, {text['samples']} samples of "
                f"{text['source']}, seed {text['seed']}: {number(row.perplexity)}",
            }
        )
    if not values:
        return None
    x, y = _axis("x", "samples of calibration text", log=True), _axis("y", "perplexity", log=True)
    place = {"x": x, "y": y, "color": _colour("method", _methods(results))}
    # a line for each text
    dash: Spec = {"field": "text", "type": "nominal", "title": None}
    if len({value["text"] for value in values}) == 1:
        dash["legend"] = None
    means = {**place, "y": {**y, "aggregate": "mean"}, "strokeDash": dash}
    spec = _facets([_layer("line", means), _points(place, 50)], "pattern", values)
    words = "Every mark is one draw; the line goes through the means."
    return _plan("Perplexity by calibration text", words, spec, values)


def _layers(results: Results) -> list[Plan | None]:
    """Output error by block, and sparsity by block where it differs between blocks."""
    values = []
    reached = {reach["pattern"] for reach in results.tolerance.get("found", ())}
    patterns = [row.pattern for row in results.table]
    for row in results.table:
        if row.pattern in reached and patterns.count(row.pattern) == 1:
            continue  # what a search ended at, beside nothing
        blocks: dict[int, list[tuple[float, float | None]]] = defaultdict(list)
        for name, sparsity, error in row.sites:
            if matched := re.search(r"\.(\d{1,9})\.", name):
                blocks[int(matched[1])].append((sparsity, error))
        for block, matrices in blocks.items():
            errors = [error for _, error in matrices if error is not None]
            values.append(
                {
                    "x": block,
                    "method": method(row),
                    "pattern": row.pattern,
                    "sparsity": 100 * sum(share for share, _ in matrices) / len(matrices),
                    "error": sum(errors) / len(errors) if errors else None,
                }
            )
    shares = defaultdict(set)
    for value in values:
        shares[value["method"], value["pattern"]].add(round(value["sparsity"]))
    errors = [{**value, "y": value["error"]} for value in values if value["error"]]
    uneven = [
        {**value, "y": value["sparsity"]}
        for value in values
        if len(shares[value["method"], value["pattern"]]) > 1
    ]
    return [
        _by_block(results, errors, "Output error by block", " of ‖(W − W')X‖² / ‖WX‖²."),
        _by_block(results, uneven, "Sparsity by block, %", ", where blocks differ."),
    ]


def _by_block(results: Results, values: list[Spec], title: str, what: str) -> Plan | None:
    if not values:
        return None
    for value in values:
        where = f"{value['method']} {value['pattern']}, block {value['x']}"
        value["words"] = f"{where}: {value['y']:.3g}"
    place = {
        "x": _axis("x", "block", whole=True),
        "y": _axis("y", title[0].lower() + title[1:], log="error" in title),
        "color": _colour("method", _methods(results)),
    }
    spec = _facets([_layer("line", place), _points(place, 40)], "pattern", values)
    return _plan(title, f"Mean over the weight matrices of a block{what}", spec, values)


def _layer(mark: str, encoding: Spec, **look: Any) -> Spec:
    return {"mark": {"type": mark, **look}, "encoding": encoding}


def _points(encoding: Spec, size: int) -> Spec:
    """A mark for every value, with the words that a pointer reads."""
    encoding = {**encoding, "description": {"field": "words"}}
    return _layer("point", encoding, filled=True, size=size, opacity=1)


def _methods(results: Results) -> list[str]:
    """The methods in the order of the table, so that each has its colour in every picture."""
    return list(dict.fromkeys(method(row) for row in results.pruned))


def _wide(rows: list[Row]) -> bool:
    """Whether perplexities are so far apart that only their logarithms can be told apart."""
    return max(row.perplexity for row in rows) > 3 * min(row.perplexity for row in rows)


def _axis(field: str, title: str, *, log: bool = False, whole: bool = False) -> Spec:
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {"padding": 12, **({"type": "log", "nice": False} if log else {"zero": False})},
        "axis": {
            "format": "~g" if log else "~r",
            "tickCount": 6,
            **({"tickMinStep": 1} if whole else {}),
        },
    }


def _colour(field: str, domain: list[str], first: int = 1) -> Spec:
    colours = [COLOURS[(first + number) % len(COLOURS)] for number in range(len(domain))]
    scale = {"domain": domain, "range": colours}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def _facets(layers: list[Spec], field: str, values: list[Spec]) -> Spec:
    """One panel for every value of a field, two beside each other; no panels where there is one."""
    order = list(dict.fromkeys(value[field] for value in values))
    if len(order) == 1:
        return {"layer": layers}
    return {
        "facet": {"field": field, "type": "nominal", "title": None, "sort": order},
        "columns": 2,
        "spec": {"layer": layers, "width": WIDTH // 2 - 30, "height": 170},
        "resolve": {"scale": {"y": "independent", "x": "independent"}},
    }


def _plan(title: str, words: str, spec: Spec, values: list[Spec]) -> Plan:
    size = {} if "facet" in spec else {"width": WIDTH, "height": HEIGHT}
    data = {"data": {"values": values}, "background": "transparent", "config": LOOK}
    return Plan(title, words, {**size, **spec, **data})


def _described(svg: str, words: str) -> str:
    """The SVG as a picture that is read aloud by its words, its marks by what a pointer shows."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        label = element.attrib.pop("aria-label", None)
        for name in ("role", "aria-roledescription", "aria-hidden"):
            element.attrib.pop(name, None)
        if label and element.tag.endswith("path"):
            ElementTree.SubElement(element, f"{{{SVG}}}title").text = label
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib |= {
        "role": "img",
        "aria-label": words,
        "style": f"max-width: {width}px",
        "viewBox": f"0 0 {width} {height}",
    }
    return ElementTree.tostring(root, encoding="unicode")
