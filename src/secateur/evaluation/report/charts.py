"""The pictures of a comparison, as SVG that needs nothing from outside: Vega-Lite specifications,
drawn once here.

Colours are variables of the page (`--c1` … and `currentColor`), so one picture does for light and
dark. Whoever points at a mark reads what it is. Kinds of sparsity differ in shape as well as in
colour.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from secateur.evaluation.report.tables import fastest, method, number
from secateur.evaluation.report.vega import draw
from secateur.evaluation.results.schema import KINDS, Results, Row
from secateur.methods.patterns import share_of

COLOURS = [f"var(--c{number})" for number in range(1, 9)]
"""The first is that of the dense model."""
SHAPES = ("diamond", "circle", "square", "triangle-up")
SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 440, 280
LOOK = {
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelOverlap": "greedy",
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "columns": 4,
        "symbolStrokeColor": "currentColor",
    },
    "header": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 13},
    "text": {"color": "currentColor"},
    "rule": {"color": "currentColor"},
}


@dataclass(frozen=True)
class Chart:
    """A picture: what it shows, in a heading and in words for those who do not see it, and the SVG
    itself.
    """

    title: str
    words: str
    svg: str


@dataclass(frozen=True)
class Plan:
    """A picture that is yet to be drawn."""

    title: str
    words: str
    specification: dict[str, Any]


def charts(results: Results) -> list[Chart]:
    """Every picture that a comparison has the figures for. Raises NotDrawn."""
    found = plans(results)
    drawn = draw([plan.specification for plan in found]) if found else []
    return [
        Chart(plan.title, plan.words, _described(svg, f"{plan.title}. {plan.words}"))
        for plan, svg in zip(found, drawn, strict=True)
    ]


def plans(results: Results) -> list[Plan]:
    """What is to be drawn."""
    found = (
        _against(
            results, "bytes on disk, MiB", "size", lambda row: row.disk_bytes / 2**20, least=True
        ),
        _against(results, "tokens/s where measured", "measured speed", _speed, least=False),
        _sweep(results),
        _draws(results),
        *_layers(results),
    )
    return [plan for plan in found if plan]


def front(points: list[tuple[float, float]], *, least: bool) -> list[int]:
    """The points (x, perplexity) that none beats in both: the Pareto front, by x. `least`: less x
    is better.
    """
    order = sorted(
        range(len(points)), key=lambda i: (points[i][0] if least else -points[i][0], points[i][1])
    )
    found: list[int] = []
    for i in order:
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return sorted(found, key=lambda i: points[i][0])


def _speed(row: Row) -> float | None:
    best = fastest(row)
    return best["tokens_per_second"] if best else None


def _against(results: Results, axis: str, what: str, x: Any, *, least: bool) -> Plan | None:
    """Perplexity against a cost, with the Pareto front; the kind of sparsity is the shape of a
    mark.
    """
    rows = [row for row in results.table if x(row) is not None]
    if len(rows) < 3 or len({x(row) for row in rows}) < 2:
        return None
    best = front([(x(row), row.perplexity) for row in rows], least=least)
    values = [
        {
            "x": x(row),
            "y": row.perplexity,
            "kind": row.kind,
            "name": f"{method(row)} {row.pattern}".removesuffix(" -"),
            "words": f"{method(row)} {row.pattern}, {row.kind}: "
            f"perplexity {number(row.perplexity)}, {x(row):.4g} {axis}",
            "front": i in best,
        }
        for i, row in enumerate(rows)
    ]
    place = {"x": _axis("x", axis), "y": _axis("y", "perplexity", log=_wide(rows))}
    spec = {
        "layer": [
            {
                "mark": {
                    "type": "line",
                    "color": "currentColor",
                    "strokeDash": [4, 3],
                    "opacity": 0.7,
                },
                "transform": [{"filter": "datum.front"}],
                "encoding": place,
            },
            {
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {
                    **place,
                    "color": _colour("kind", list(KINDS), 0),
                    "description": {"field": "words"},
                    "shape": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": list(KINDS), "range": list(SHAPES)},
                    },
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 8, "dy": -6, "fontSize": 11},
                "transform": [{"filter": "datum.front"}],
                "encoding": {**place, "text": {"field": "name"}},
            },
        ]
    }
    names = ", ".join(str(values[i]["name"]) for i in best)
    return _chart(
        f"Perplexity against {what}", f"None is better in both than: {names}.", spec, values
    )


def _sweep(results: Results) -> Plan | None:
    """Perplexity over the share that is taken out, a curve a method; each kind of share stands
    apart.
    """
    values, families = [], defaultdict(set)
    for row in results.rows:
        found = share_of(row.pattern)
        if found and not row.calibration and row.values == "as stored":
            share, of = found[0], f"share{found[1] or ' of single weights'}"
            families[of].add(share)
            values.append(
                {
                    "x": share,
                    "y": row.perplexity,
                    "method": method(row),
                    "of": of,
                    "low": results.dense.perplexity + row.delta_interval[0],
                    "high": results.dense.perplexity + row.delta_interval[1],
                    "words": f"{method(row)} {row.pattern}: perplexity {number(row.perplexity)}",
                }
            )
    values = [value for value in values if len(families[value["of"]]) >= 3]
    if not values:
        return None
    place = {"x": _axis("x", "taken out, %"), "y": _axis("y", "perplexity", log=True)}
    colour = {"color": _colour("method", _methods(results))}
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line"}, "encoding": {**place, **colour}},
        {
            "mark": {"type": "rule"},
            "encoding": {
                "x": place["x"],
                "y": {**place["y"], "field": "low"},
                "y2": {"field": "high"},
                **colour,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
            "encoding": {**place, **colour, "description": {"field": "words"}},
        },
    ]
    words = f"Dense: {number(results.dense.perplexity)}. Bars: 95 % intervals of the difference."
    if results.tolerance:
        most = results.dense.perplexity * (1 + results.tolerance["share"])
        words += f" Dashed: {100 * results.tolerance['share']:.3g} % more than dense."
        layers.append(
            {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"y": {"datum": most}}}
        )
    return _chart(
        "Perplexity by how much is taken out", words, _facets(layers, "of", values), values
    )


def _draws(results: Results) -> Plan | None:
    """Perplexity by the size of the calibration text: every draw a mark, a line through their
    means.
    """
    drawn = {row.name for row in results.rows if row.calibration}
    values = [
        {
            "x": draw["samples"],
            "y": row.perplexity,
            "method": method(row),
            "pattern": row.pattern,
            "text": Path(draw["source"]).name,
            "words": f"{method(row)} {row.pattern}, {draw['samples']} samples of "
            f"{draw['source']}, seed {draw['seed']}: "
            f"{number(row.perplexity)}",
        }
        for row in results.rows
        if row.name in drawn
        and row.calibration is not None
        and not row.searched
        and row.values == "as stored"
        for draw in [results.calibrations[row.calibration]]
    ]
    if not values:
        return None
    place = {
        "x": _axis("x", "samples of calibration text", log=True),
        "y": _axis("y", "perplexity", log=True),
    }
    colour = {"color": _colour("method", _methods(results))}
    text = {"field": "text", "type": "nominal", "title": None}
    several = len({value["text"] for value in values}) > 1
    dashes = {
        "strokeDash": {**text, **({} if several else {"legend": None})}
    }  # a line for each text
    layers = [
        {
            "mark": {"type": "line"},
            "encoding": {**place, "y": {**place["y"], "aggregate": "mean"}, **colour, **dashes},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
            "encoding": {**place, **colour, "description": {"field": "words"}},
        },
    ]
    words = "Every mark is one draw; the line goes through the means."
    return _chart(
        "Perplexity by calibration text", words, _facets(layers, "pattern", values), values
    )


def _layers(results: Results) -> list[Plan | None]:
    """Output error and sparsity of the sites, block by block; sparsity only where it differs
    between blocks.
    """
    values = []
    found = {reach["pattern"] for reach in results.tolerance.get("found", ())}
    patterns = [row.pattern for row in results.table]
    for row in results.table:
        if (
            row.pattern in found and patterns.count(row.pattern) == 1
        ):  # what a search ended at, beside nothing
            continue
        blocks: dict[int, list[tuple[float, float | None]]] = defaultdict(list)
        for site, sparsity, error in row.sites:
            if matched := re.search(r"\.(\d{1,9})\.", site):
                blocks[int(matched[1])].append((sparsity, error))
        for block, found in blocks.items():
            errors = [error for _, error in found if error is not None]
            values.append(
                {
                    "x": block,
                    "method": method(row),
                    "pattern": row.pattern,
                    "sparsity": 100 * sum(share for share, _ in found) / len(found),
                    "error": sum(errors) / len(errors) if errors else None,
                }
            )
    errors = [value for value in values if value["error"]]
    shares = defaultdict(set)
    for value in values:
        shares[value["method"], value["pattern"]].add(round(value["sparsity"]))
    uneven = [value for value in values if len(shares[value["method"], value["pattern"]]) > 1]
    return [
        _by_block(
            results,
            errors,
            "error",
            "output error by block",
            "mean over the sites of a block of ‖(W − W')X‖² / ‖WX‖²",
        ),
        _by_block(
            results,
            uneven,
            "sparsity",
            "sparsity by block, %",
            "mean over the sites of a block, where blocks differ",
        ),
    ]


def _by_block(
    results: Results, values: list[dict[str, Any]], field: str, title: str, words: str
) -> Plan | None:
    if not values:
        return None
    values = [
        {
            **v,
            "y": v[field],
            "words": f"{v['method']} {v['pattern']}, block {v['x']}: {v[field]:.3g}",
        }
        for v in values
    ]
    place = {"x": _axis("x", "block", whole=True), "y": _axis("y", title, log=field == "error")}
    colour = {"color": _colour("method", _methods(results))}
    layers = [
        {"mark": {"type": "line"}, "encoding": {**place, **colour}},
        {
            "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
            "encoding": {**place, **colour, "description": {"field": "words"}},
        },
    ]
    return _chart(
        title[0].upper() + title[1:],
        words[0].upper() + words[1:] + ".",
        _facets(layers, "pattern", values),
        values,
    )


def _methods(results: Results) -> list[str]:
    """The methods in the order of the table, so that each has its colour in every picture."""
    return list(dict.fromkeys(method(row) for row in results.table if row.kind != "dense"))


def _wide(rows: list[Row]) -> bool:
    """Whether perplexities are so far apart that only their logarithms can be told apart."""
    return max(row.perplexity for row in rows) > 3 * min(row.perplexity for row in rows)


def _axis(field: str, title: str, *, log: bool = False, whole: bool = False) -> dict[str, Any]:
    scale = {"type": "log", "nice": False, "padding": 12} if log else {"zero": False, "padding": 12}
    held: dict[str, Any] = {"field": field, "type": "quantitative", "title": title, "scale": scale}
    return held | {
        "axis": {
            "format": "~g" if log else "~r",
            "tickCount": 6,
            **({"tickMinStep": 1} if whole else {}),
        }
    }


def _colour(field: str, domain: list[str], first: int = 1) -> dict[str, Any]:
    chosen = [COLOURS[(first + number) % len(COLOURS)] for number in range(len(domain))]
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "scale": {"domain": domain, "range": chosen},
    }


def _facets(
    layers: list[dict[str, Any]], field: str, values: list[dict[str, Any]]
) -> dict[str, Any]:
    """One panel for every value of a field, two beside each other; no panels where there is one."""
    if len({value[field] for value in values}) == 1:
        return {"layer": layers}
    return {
        "facet": {
            "field": field,
            "type": "nominal",
            "title": None,
            "sort": list(dict.fromkeys(v[field] for v in values)),
        },
        "columns": 2,
        "spec": {"layer": layers, "width": WIDTH // 2 - 30, "height": 170},
        "resolve": {"scale": {"y": "independent", "x": "independent"}},
    }


def _chart(title: str, words: str, spec: dict[str, Any], values: list[dict[str, Any]]) -> Plan:
    size = {} if "facet" in spec else {"width": WIDTH, "height": HEIGHT}
    return Plan(
        title,
        words,
        {**size, **spec, "data": {"values": values}, "background": "transparent", "config": LOOK},
    )


def _described(svg: str, words: str) -> str:
    """The SVG as one picture with words for those who do not see it, and on every mark what a
    pointer should read.
    """
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
