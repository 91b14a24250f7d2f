"""The page of a demo comparison as a picture, light and dark, for the docs: `make page`.

    python bench/page.py [--out out/page] [--pictures docs/images]

The comparison is resumed where it was; the pictures need Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from common import options
from playwright.sync_api import sync_playwright

import secateur
from secateur.system.progress import show

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def pictures(report: Path, folder: Path) -> None:
    """The upper part of a page, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for theme in ("light", "dark"):
            page = browser.new_context(color_scheme=theme, viewport={"width": 1200, "height": 2150}).new_page()
            page.goto(f"file://{report.resolve()}")
            page.screenshot(path=folder / f"page-{theme}.png")
        browser.close()


if __name__ == "__main__":
    chosen = options(__doc__, dict(out=Path("out/page"), pictures=Path("docs/images")))
    secateur.compare(
        out=chosen.out, methods=["magnitude", "wanda", "sparsegpt", "energy"],
        patterns=["30%..70%/20%", "2:4", "25% of channels"], samples=[8, 64], seed=[0, 1, 2], windows=128,
        tolerance="5%", bench=["eager", "packed"], command=["python", *sys.argv], progress=show(quiet=False),
    )  # fmt: skip
    pictures(chosen.out / "report.html", chosen.pictures)
