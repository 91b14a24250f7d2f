"""Text and conversations as nobody should write them, plain and compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from random import Random
from typing import Any

from support.spoilt_json import NASTY

LINES = 40
PACKED = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": lambda data: b"(\xb5/\xfd" + data}


def spoil_text(folder: Path, draw: Random) -> str:
    """Write a text file `text.…` of rows that are mostly sound into a folder; what it is, in a few words."""
    shape = draw.choice(["text", "messages", "conversations", "alpaca", "prompt", "mixed"])
    rows: list[Any] = [_row(shape, draw, index) for index in range(LINES)]
    what = draw.choice(["sound", "value", "value", "missing", "type", "bytes", "cut", "list"])
    place = draw.randrange(len(rows))
    if what == "value" and rows[place]:
        rows[place][draw.choice(sorted(rows[place]))] = draw.choice(NASTY)
    elif what == "missing" and rows[place]:
        del rows[place][draw.choice(sorted(rows[place]))]
    elif what == "type":
        rows[place] = draw.choice([*NASTY, [], [[]], "a", 1, None, {"messages": {}}, {"messages": [{}]}])
    suffix = draw.choice([".jsonl", ".jsonl", ".json", ".txt"])
    if what == "list" or suffix == ".json":
        text = json.dumps(rows, default=str)
    else:
        text = "\n".join(json.dumps(row, default=str) for row in rows)
    data = text.encode("utf-8", "surrogatepass")
    if what == "bytes":
        at = draw.randrange(len(data))
        data = data[:at] + draw.randbytes(draw.choice([1, 3, 100])) + data[at:]
    packed = draw.choice(["", "", *PACKED])
    data = PACKED[packed](data) if packed else data
    data = data[: draw.randrange(len(data))] if what == "cut" else data
    (folder / f"text{suffix}{packed}").write_bytes(data)
    return f"{shape} rows as text{suffix}{packed}: {what}"


def _row(shape: str, draw: Random, index: int) -> dict[str, Any]:
    words = " ".join(draw.choices(["a", "model", "is", "pruned", "東京", "\n", "def f(x):"], k=draw.randint(1, 40)))
    if shape == "mixed":
        shape = draw.choice(["text", "messages", "conversations", "alpaca", "prompt"])
    roles = draw.choices(["user", "assistant", "system", "tool", "human", "gpt", "", 7], [9, 9, 1, 1, 1, 1, 1, 1], k=3)
    return {
        "text": {"text": words},
        "messages": {"messages": [{"role": role, "content": words} for role in roles]},
        "conversations": {"conversations": [{"from": role, "value": words} for role in roles]},
        "alpaca": {"instruction": words, "input": "", "output": words},
        "prompt": {"prompt": words, "completion": words, "id": index},
    }[shape]
