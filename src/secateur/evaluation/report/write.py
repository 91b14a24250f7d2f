"""A comparison as a Markdown page and as one for a browser, which needs nothing else."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.errors import printable
from secateur.evaluation.report.charts import charts
from secateur.evaluation.report.tables import FIRST, conditions, sheets
from secateur.evaluation.report.vega import NotDrawn
from secateur.evaluation.results.schema import Results
from secateur.system.files import write_whole


def markdown(results: Results) -> str:
    """The comparison as a Markdown page with its conditions."""
    lines: list[str] = []
    for number, sheet in enumerate(sheets(results)):
        cells = [[line[column][0] for column in sheet.columns] for line in sheet.lines]
        head, *rows = (f"| {' | '.join(map(_escape, row))} |" for row in (sheet.columns, *cells))
        lines += [f"{'##' if number else '#'} {_escape(sheet.title)}", "", head]
        lines += ["|" + "---|" * len(sheet.columns), *rows, "", _escape(sheet.caption), ""]
    lines += ["## Conditions", ""]
    lines += [f"* {what}: {_escape(how)}" for what, how in conditions(results)]
    return "\n".join(lines) + "\n"


def write_report(results: Results, out: Path) -> None:
    """Write `report.md` and `report.html`."""
    write_whole(out / "report.md", markdown(results))
    write_whole(out / "report.html", page(results))


def _escape(text: str) -> str:
    """Text from outside as Markdown shows it literally."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|" else c for c in printable(text))


def page(results: Results) -> str:
    """The page. The template escapes what comes from a checkpoint; the pictures do themselves."""
    environment = Environment(
        loader=PackageLoader("secateur.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first, *others = sheets(results)
    try:
        pictures, missing = charts(results), ""
    except NotDrawn as error:
        pictures, missing = [], str(error)
    return environment.get_template("page.html").render(
        results=results,
        first=first,
        others=others,
        named=FIRST,
        conditions=conditions(results),
        charts=[(chart, Markup(chart.svg)) for chart in pictures],
        missing=missing,
    )
