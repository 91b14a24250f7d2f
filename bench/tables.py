"""Make the tables of docs/deploying.md and docs/recommend.md that say what is known of runtimes and hardware.

    python bench/tables.py

They come from src/secateur/deployment/sparsity_support.toml, and stand between two comments that name them. A test says
so where a page is older than the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from secateur.deployment.sparsity_support import KNOWN, RULES
from secateur.evaluation.advice.hardware import HARDWARE
from secateur.evaluation.advice.priors import PRIORS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/deploying.md", "docs/recommend.md")


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table."""
    rows = [f"| {' | '.join(row)} |" for row in (columns, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(columns), *rows[1:]])


def all_of(names: Sequence[str]) -> str:
    """Write down what a prior is about; none named: everything."""
    return ", ".join(names) or "all"


def tables() -> dict[str, str]:
    """Return every table by its name."""
    kinds: dict[tuple[str, bool, str, str], list[str]] = {}
    for name, known in HARDWARE.items():
        kinds.setdefault((known.says, known.two_of_four, known.source, known.date), []).append(name)
    return {
        "users": table(
            ["what", "who uses it", "who did"],
            ([entry["what"], entry["who"], entry.get("formerly", "")] for entry in KNOWN["users"]),
        ),
        "rules": table(
            ["`--for`", "uses the zeros of", "known from", "date"],
            ([f"`{name}`", rule.uses, rule.source, rule.date] for name, rule in RULES.items()),
        ),
        "removals": table(
            ["when", "who", "what went", "reference"],
            ([entry["when"], entry["who"], entry["what"], entry["reference"]] for entry in KNOWN["removals"]),
        ),
        "priors": table(
            ["kind", "goals", "hardware", "runtimes", "what", "source", "date"],
            ([p.kind, all_of(p.goals), all_of(p.makers), all_of(p.runtimes), p.says, p.source, p.date] for p in PRIORS),
        ),
        "hardware": table(
            ["`--hardware`", "what is known", "2:4 products", "source", "date"],
            (
                [", ".join(f"`{name}`" for name in names), says, "yes" if two_of_four else "no", source, date]
                for (says, two_of_four, source, date), names in kinds.items()
            ),
        ),
    }


def renewed(page: str) -> str:
    """Put the tables as they are now into the text of a page."""
    for name, text in tables().items():
        between = rf"(<!-- {name}: [^>]*-->\n\n).*?(<!-- end of {name} -->)"
        page = re.sub(between, lambda found, text=text: f"{found[1]}{text}\n\n{found[2]}", page, flags=re.DOTALL)
    return page


def main() -> None:
    for page in (ROOT / name for name in PAGES):
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
