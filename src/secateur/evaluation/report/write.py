"""A comparison as people read it: on the terminal, as a Markdown page, and as the page for a
browser.

`report.html` is one file that needs nothing from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from secateur.errors import printable
from secateur.evaluation.report.charts import charts
from secateur.evaluation.report.tables import FIRST, NARROW, SPEED, TASKS, Sheet, conditions, sheets
from secateur.evaluation.report.vega import NotDrawn
from secateur.evaluation.results.schema import Results
from secateur.system.files import write_whole

WIDE_CHARACTERS = 150
WHOLE = ("pattern", "kind", "rank", "runtime", "perplexity", "tokens/s")
"""Columns that keep their words whole where it is narrow; intervals and long names of methods
break.
"""


def table(results: Results, characters: int) -> Group:
    """The comparison as tables for a terminal that wide; on a narrow one the first has the most
    important columns.
    """
    first, *others = sheets(results)
    more = [column for column in first.columns if column in (*SPEED, *TASKS)]
    if characters < WIDE_CHARACTERS:
        shown = [_table(first, NARROW)]
        for title, group in (("Tasks", TASKS), ("Speed", SPEED)):
            if group[0] in more and title not in {sheet.title for sheet in others}:
                lines = [line for line in first.lines if line[group[0]][0] != "-"]
                part = replace(first, title=title, caption="", lines=lines, groups=[0] * len(lines))
                shown.append(_table(part, (*FIRST, *group)))
    else:
        rest = [
            column for column in first.columns if column in (*NARROW, "sparsity", "on disk", *more)
        ]
        shown = [_table(first, rest if more else first.columns)]
    return Group(*shown, *(_table(sheet, sheet.columns) for sheet in others))


def _table(sheet: Sheet, columns: Sequence[str]) -> Table:
    shown = Table(
        title=escape(printable(sheet.title)),
        caption=escape(printable(sheet.caption)),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        left = column in (*FIRST, "text")
        shown.add_column(
            escape(column), justify="left" if left else "right", no_wrap=column in WHOLE
        )
    for before, group, line in zip([0, *sheet.groups], sheet.groups, sheet.lines, strict=False):
        if before != group:
            shown.add_section()
        shown.add_row(*(escape(printable(line[column][0])) for column in columns))
    return shown


def markdown(results: Results) -> str:
    """The comparison as a Markdown page with its conditions."""
    lines: list[str] = []
    for number, sheet in enumerate(sheets(results)):
        lines += [
            f"{'##' if number else '#'} {_escape(sheet.title)}",
            "",
            "| " + " | ".join(map(_escape, sheet.columns)) + " |",
            "|" + "---|" * len(sheet.columns),
            *(
                "| " + " | ".join(_escape(line[column][0]) for column in sheet.columns) + " |"
                for line in sheet.lines
            ),
            "",
            _escape(sheet.caption),
            "",
        ]
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
    """The page. What comes from a checkpoint is escaped by the template; the pictures escape it
    themselves.
    """
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
