"""JSON documents that somebody spoilt: a value changed in the tree, or the bytes of the text."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**9, 2**31, 2**40, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), "", "x", "nan", "1", "2:4", "50%", "50% of row", "../sentinel",
    "/etc/passwd", "<img src=x onerror=alert(1)>", "a\nb", "a\r\nb", "\x1b[31mred\x1b[0m", "\x00", "\ud800",
    "\u202eabc",
    "[red]x[/red]", "[/]", "{0}", "%s%n", "x" * 100_000, [], {}, [[]], [None], [1], [1, 2], [-1, 10**30], ["a", "b"],
    {"a": {}}, {"": None}, list(range(1000)), [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip
DEEP = 10**5


def spoilt_names(draw: Random) -> list[str]:
    """Names that no tensor, site or shard should have."""
    return [
        "", "\n", "a\nb", "<script>alert(1)</script>", "a\x00b", "../../sentinel/x", "\x1b[2J", "\u202eabc", "[bold]x",
        "model.layers.99999999999999999999.mlp.up_proj.weight", "model.layers.-1.x", "model.layers.0", "x" * 10_000,
        "__metadata__", ".", "%s", f"model.layers.{draw.randint(0, 9)}.self_attn.q_proj.weight", "é" * 50,
        "model..weight",
    ]  # fmt: skip


def spoilt(data: bytes, draw: Random) -> tuple[bytes, str]:
    """The bytes of a JSON document, changed, and what was done to it."""
    if draw.random() < 0.3:
        return _spoilt_text(data, draw)
    held = json.loads(data)
    said = [_spoil_tree(held, draw) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
    return json.dumps(held).encode(), "; ".join(said)


def _spoilt_text(data: bytes, draw: Random) -> tuple[bytes, str]:
    place = draw.randrange(len(data) + 1)
    deep = draw.choice([50, 150, 900, 5000, DEEP])
    key, value = json.dumps(draw.choice(_keys(json.loads(data)))).encode(), json.dumps(draw.choice(NASTY)).encode()
    texts = {
        "empty": b"",
        "cut": data[:place],
        "flipped": data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :],
        "not UTF-8": data[:place] + b"\xff\xfe" + data[place:],
        "UTF-16": data.decode().encode("utf-16"),
        "mark": b"\xef\xbb\xbf" + data,
        "NUL": data[:place] + b"\x00" + data[place:],
        "garbage": data + b"} trailing",
        f"deep {deep}": data.rstrip()[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}",
        f"deep objects {deep}": data.rstrip()[:-1] + b', "deep": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
        f"open {deep}": b"[" * deep,
        "twice": data.rstrip()[:-1] + b", " + key + b": " + value + b"}",
        "twice before": b"{" + key + b": " + value + b", " + data.lstrip()[1:],
        "long number": data.rstrip()[:-1] + b', "number": ' + b"9" * draw.choice([400, 5000, 10**6]) + b"}",
        "large float": data.rstrip()[:-1] + b", " + key + b": 1e999}",
        "no object": draw.choice([b"[]", b"null", b"7", b'"x"', b"[1]", b"NaN", b"[{}]", b"true"]),
        "many": b"{" + b",".join(b'"k%d": %d' % (i, i) for i in range(20_000)) + b"}",
    }
    what = draw.choice(sorted(texts))
    return texts[what], what


def _keys(held: Any) -> list[str]:
    return list(held) if isinstance(held, dict) and held else ["x"]


def _spoil_tree(held: Any, draw: Random) -> str:
    """Change one place of a tree; deep places are as likely as shallow ones are."""
    node: Any = held
    where = "top"
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        where = f"{where}.{key}"[:120]
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or draw.random() < 0.3:
            break
        node = child
    what = draw.choice(["set", "set", "set", "set", "number", "gone", "renamed", "swapped"])
    if what == "number" and isinstance(child, (int, float)):
        node[key] = draw.choice(
            [0, -child, child + 1, child - 1, child * 2, child * 10**9, child % 7 + 0.5, str(child)]
        )
    elif what == "gone":
        del node[key]
    elif what == "renamed" and isinstance(node, dict):
        node[draw.choice(spoilt_names(draw))] = node.pop(key)
    elif what == "swapped" and len(keys) > 1:
        other = draw.choice(keys)
        node[key], node[other] = node[other], node[key]
    else:
        node[key] = deepcopy(draw.choice(NASTY))  # it may be spoilt in turn
        return f"{where} = {node[key]!r:.60}"
    return f"{what} {where}"
