"""JSON that somebody else wrote, read with care, and our own, written in one way.

JSON may be nested until whoever walks it fails, hold text that cannot be printed, and numbers that
no JSON has: `read_json` refuses all that.
"""

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import BadCheckpoint, in_one_line
from secateur.system.files import MOST_BYTES

MOST_DEPTH = 64
"""Of objects and lists in each other."""


def read_json(file: Path, *, finite: bool = False) -> Any:
    """The value in a JSON file. `finite`: NaN and Infinity, which Python writes, are refused.

    Raises ValueError for what is no JSON, not UTF-8, nested deeper than `MOST_DEPTH`, too large, no
    plain file, or has text that cannot be encoded again; OSError where it cannot be opened.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no plain file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes")
    return parsed_json(file.read_text(encoding="utf-8"), finite=finite)


def parsed_json(text: str, *, finite: bool = False) -> Any:
    """The value that a JSON text stands for. Raises ValueError as `read_json` does."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    for part, depth in _parts(value):
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH}")
        if isinstance(part, str):
            part.encode()  # half of a surrogate pair is a UnicodeEncodeError, hence a ValueError
        elif finite and isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"it holds {part}")
    return value


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """Everything in a JSON value, keys as well, with how deep it lies; without recursion."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        yield part, depth
        if isinstance(part, dict):
            waiting += [(inside, depth + 1) for pair in part.items() for inside in pair]
        elif isinstance(part, list):
            waiting += [(inside, depth + 1) for inside in part]


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, an object. Raises BadCheckpoint."""
    try:
        value = read_json(file)
    except ValueError as error:
        raise BadCheckpoint(f"{file} is no JSON ({in_one_line(error)}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{file} holds a {type(value).__name__}; an object was wanted.")
    return value


def json_text(value: Any, indent: int = 1, *, finite: bool = False) -> str:
    """A JSON document as every file of ours holds one, with a line feed at its end.

    `finite`: raises ValueError for NaN and Infinity.
    """
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=not finite) + "\n"


def write_json(file: Path, value: Any, indent: int = 1, *, finite: bool = False) -> None:
    """Write one value as a JSON document, in UTF-8."""
    file.write_text(json_text(value, indent, finite=finite), encoding="utf-8")
