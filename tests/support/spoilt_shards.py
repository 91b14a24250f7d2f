"""safetensors files that somebody spoilt: the length, the JSON of the header, its entries, the data, the metadata."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from support.spoilt_json import NASTY, spoilt, spoilt_names

KEY = "secateur.packed"
DTYPES = (
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2",
    "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "X", "", "F32\n", None, 4,
)  # fmt: skip
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "U8": 1, "I8": 1, "BOOL": 1, "I32": 4, "F8_E4M3": 1,
         "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8, "C64": 8}  # fmt: skip


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a shard as an object, and its data."""
    held = file.read_bytes()
    length = int.from_bytes(held[:8], "little")
    return json.loads(held[8 : 8 + length]), held[8 + length :]


def write(file: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    """Write a shard of a header's text and data, whatever they are."""
    text += b" " * (-len(text) % 8)
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def spoil_header(file: Path, draw: Random) -> str:
    """Change a shard; returns what was done."""
    what = draw.choice(
        ["length", "json", "json", "cut", "long", "bytes", "data", "offsets", "dtype", "retyped", "shape", "reshaped",
         "renamed", "many", "metadata", "gone", "empty tensor", "zero sized", "overflow", "hole"]
    )  # fmt: skip
    whole = file.read_bytes()
    header, data = parts(file)
    text = whole[8 : len(whole) - len(data)]
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    if what == "length":
        sizes = [0, 1, 7, len(text) - 1, len(text) + 1, len(whole), 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
        length = draw.choice(sizes)
        write(file, text, data, length)
        return f"length {length}"
    if what == "json":
        changed, said = spoilt(text, draw)
        write(file, changed, data)
        return f"header {said}"
    if what in ("cut", "long"):
        place = draw.choice([0, 1, 7, 8, 9, len(text), len(whole) - 1, draw.randrange(len(whole))])
        file.write_bytes(whole[:place] if what == "cut" else whole + draw.randbytes(place % 1000 + 1))
        return f"{what} {place}"
    if what in ("bytes", "data"):
        spoilt_bytes = bytearray(whole)
        for _ in range(draw.choice([1, 4, 50])):
            place = draw.randrange(8, 8 + len(text)) if what == "bytes" else draw.randrange(8 + len(text), len(whole))
            spoilt_bytes[place] = draw.choice([draw.randrange(256), 0, 0x80, 0xFF])
        file.write_bytes(spoilt_bytes)
        return what
    _spoil_entry(header, name, entry, what, draw)
    if what == "gone":
        start, stop = entry["data_offsets"]
        data = data[:start] + data[stop:]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= stop:
                other["data_offsets"] = [place - (stop - start) for place in other["data_offsets"]]
    write(file, json.dumps(header).encode(), data)
    return f"{what} {name}: {str(header.get(name))[:120]}"


def _spoil_entry(header: dict[str, Any], name: str, entry: dict[str, Any], what: str, draw: Random) -> None:
    """Change one entry of a header in place."""
    start, stop = entry["data_offsets"]
    sizes = [0, 1, -1, start, stop, stop + 1, stop - 1, 2**31, 2**63, 2**64, 10**30, 1.5, "1", None]
    if what == "offsets":
        entry["data_offsets"] = [draw.choice(sizes) for _ in range(draw.choice([2, 2, 2, 1, 3]))]
    elif what == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif what == "retyped":  # sound, but something else
        kind = draw.choice([kind for kind, size in BYTES.items() if (stop - start) % size == 0])
        entry["dtype"], entry["shape"] = kind, _shape((stop - start) // BYTES[kind], draw)
    elif what == "reshaped":
        entry["shape"] = _shape(prod(entry["shape"]), draw)
    elif what == "shape":
        entry["shape"] = [draw.choice([*sizes, *entry["shape"]]) for _ in range(draw.choice([0, 1, 2, 3, 20]))]
    elif what == "overflow":
        entry["shape"] = draw.choice([[2**32, 2**32], [2**63, 2], [2**64 - 1], [2**31] * 4, [0, 2**64], [2**62] * 3])
    elif what == "hole":
        entry["data_offsets"] = [start + 4, stop]
    elif what == "renamed":
        header[draw.choice(spoilt_names(draw))] = header.pop(name)
    elif what == "many":
        names = (f"{draw.choice(['model.layers.', 'x', '<b>'])}{i}" for i in range(draw.choice([100, 5000])))
        header.update({new: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for new in names})
    elif what in ("empty tensor", "zero sized"):
        new = (
            draw.choice(spoilt_names(draw))
            if what == "empty tensor"
            else f"{name.removesuffix('.weight')}.extra.weight"
        )
        header[new] = {"dtype": "F32", "shape": draw.choice([[0], [0, 4], [4, 0], [0, 0]]), "data_offsets": [0, 0]}
    elif what == "metadata":
        metadata: list[Any] = [{}, {"format": "x"}, {"a": 1}, {"format": "tf"}, {"\n": "\x1b[31m"}, [], *NASTY]
        header["__metadata__"] = draw.choice(metadata)
    elif what == "gone":
        del header[name]


def _shape(count: int, draw: Random) -> list[int]:
    """A shape of so many elements."""
    divisors = [d for d in (2, 3, 4, 8, 16, 32, 64, 128, 256) if count % d == 0] or [1]
    rows = draw.choice(divisors)
    return draw.choice([[count], [count // rows, rows], [rows, count // rows], [1, count], [count, 1],
                        [1] * 12 + [count], [count // rows, 1, rows]])  # fmt: skip


def spoil_metadata(file: Path, draw: Random) -> str:
    """Change what a packed shard tells of the dense one; returns what was done."""
    header, data = parts(file)
    told = header["__metadata__"][KEY]
    if draw.random() < 0.3:  # the header of the dense shard, which is text inside text
        held = json.loads(told)
        changed, said = spoilt(held["header"].encode(), draw)
        held["header"] = changed.decode(errors="replace")
        told = json.dumps(held)
    elif draw.random() < 0.3:
        held = json.loads(told)
        name = draw.choice(sorted(held["columns"]))
        held["columns"][name] = draw.choice([0, -1, 1, 63, 64, 65, 128, 2**31, 2**62, 2**63, 10**30, True, 64.0])
        told, said = json.dumps(held), f"columns of {name} {held['columns'][name]}"
    else:
        changed, said = spoilt(told.encode(), draw)
        told = changed.decode(errors="replace")
    header["__metadata__"][KEY] = told
    write(file, json.dumps(header).encode(), data)
    return f"told {said}"
