"""`report.html`: one file that needs nothing from outside, made from a comparison's figures."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.comparison.charts import charts
from secateur.comparison.draw import NotDrawn
from secateur.comparison.results import Results
from secateur.comparison.sheets import FIRST, conditions, sheets


def page(results: Results) -> str:
    """The page. What comes from a checkpoint is escaped by the template; the pictures escape it themselves."""
    environment = Environment(
        loader=PackageLoader("secateur.comparison", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    first, *others = sheets(results)
    try:
        pictures, missing = charts(results), ""
    except NotDrawn as error:
        pictures, missing = [], str(error)
    return environment.get_template("page.html").render(
        results=results, first=first, others=others, named=FIRST, conditions=conditions(results),
        charts=[(chart, Markup(chart.svg)) for chart in pictures], missing=missing,
    )  # fmt: skip
