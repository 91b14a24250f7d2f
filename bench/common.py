"""What the scripts of this folder share: options from their defaults, and JSON that says where figures were measured.

Secateur is imported only where a result is written: parts of some scripts run in environments that lack it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HIDDEN = argparse.SUPPRESS


def parser(description: str | None, *groups: dict[str, Any]) -> argparse.ArgumentParser:
    """Make the parser of a script: `dict(seq_len=512)` becomes `--seq-len`, an int that is 512 by default.

    A type in place of a default makes an option that is None by default, False a switch. A pair adds words of help.
    Groups are there for the reader; they make one list.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, option in (pair for group in groups for pair in group.items()):
        default, words = option if isinstance(option, tuple) else (option, None)
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            made.add_argument(flag, action="store_true", help=words)
        elif isinstance(default, type):
            made.add_argument(flag, type=default, help=words)
        else:
            made.add_argument(flag, type=type(default), default=default, help=words)
    return made


def options(description: str | None, *groups: dict[str, Any]) -> argparse.Namespace:
    """The options of a script as they were given, declared as `parser` says."""
    return parser(description, *groups).parse_args()


def fetched(place: Path, packages: list[str]) -> Path:
    """A folder with packages, without what they need, fetched unless it is there. Raises CalledProcessError."""
    if not place.is_dir():
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", partial]
        subprocess.run([*pip, *packages], check=True)
        partial.rename(place)
    return place


def write(file: Path | None, *, command: list[str] | None = None, **results: Any) -> dict[str, Any]:
    """Write results, if there is a file for them, with the machine and the versions; what was, or would be, written."""
    from secateur.system.machine import machine, versions

    document = {"command": command} if command else {}
    document |= {"machine": machine(), "versions": versions(), **results}
    if file:
        save(file, document)
    return document


def save(file: Path, document: Any) -> None:
    """Write a document as JSON, in a folder that is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, default=os.fspath)  # paths as text
    file.write_text(text + "\n", encoding="utf-8")
