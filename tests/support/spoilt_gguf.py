"""GGUF files by the letter of their specification: taken apart, put together again, and spoilt.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Independent of the `gguf` package.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from support.spoilt_json import spoilt_names

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18), 24: (1, 1),
    25: (1, 2), 26: (1, 4), 28: (1, 8), 30: (1, 2), 39: (32, 17),
}  # fmt: skip
"""Numbers in a block and bytes of it, for F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, I8, I16, I32, F64, BF16
and MXFP4. Types of 256 numbers do not fit rows of 64.
"""
ALIGNMENT = 32


@dataclass
class Setting:
    """A key with its value: of a type, for arrays with the type of their elements."""

    key: bytes
    kind: int
    value: Any
    inner: int = 0


@dataclass
class Info:
    """Where a tensor lies: dimensions with the innermost first, and its place behind the head of the file."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        length, held = SIZES[self.kind]
        assert self.dims[0] % length == 0
        return prod(self.dims) // length * held


@dataclass
class Gguf:
    """A whole file."""

    settings: list[Setting]
    tensors: list[Info]
    data: bytes

    def get(self, key: str, otherwise: Any = None) -> Any:
        return next((one.value for one in self.settings if one.key == key.encode()), otherwise)

    def held(self, info: Info) -> bytes:
        """The bytes of a tensor."""
        assert 0 <= info.offset <= info.offset + info.size <= len(self.data)
        return self.data[info.offset : info.offset + info.size]


class _Reader:
    def __init__(self, whole: bytes) -> None:
        self.whole, self.at = whole, 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.whole)
        self.at += count
        return self.whole[self.at - count : self.at]

    def scalar(self, kind: int) -> Any:
        code = "<" + SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> bytes:
        return self.take(self.scalar(10))

    def value(self, kind: int) -> tuple[Any, int]:
        if kind == STRING:
            return self.string(), 0
        if kind != ARRAY:
            return self.scalar(kind), 0
        inner, count = self.scalar(4), self.scalar(10)
        assert count <= len(self.whole)
        return [self.value(inner)[0] for _ in range(count)], inner


def parse(whole: bytes) -> Gguf:
    """The parts of a file. Raises AssertionError, KeyError or another error where it is none."""
    reader = _Reader(whole)
    assert reader.take(4) == b"GGUF"
    assert reader.scalar(4) in (2, 3)
    tensors, settings = reader.scalar(10), reader.scalar(10)
    assert max(tensors, settings) <= len(whole)
    found = Gguf([], [], b"")
    for _ in range(settings):
        key, kind = reader.string(), reader.scalar(4)
        found.settings.append(Setting(key, kind, *reader.value(kind)))
    for _ in range(tensors):
        name, count = reader.string(), reader.scalar(4)
        assert count <= 4
        dims = [reader.scalar(10) for _ in range(count)]
        found.tensors.append(Info(name, dims, reader.scalar(4), reader.scalar(10)))
    start = -(-reader.at // found.get("general.alignment", ALIGNMENT)) * found.get("general.alignment", ALIGNMENT)
    found.data = whole[start:]
    return found


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: Any, inner: int) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind != ARRAY:
        return struct.pack("<" + SCALARS[kind], value)
    count = len(value)
    return struct.pack("<IQ", inner, count) + b"".join(_value(inner, one, 0) for one in value)


def assemble(file: Gguf, *, version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    """The bytes of a file, with other counts of tensors and settings where they are given."""
    tensors, settings = counts or (len(file.tensors), len(file.settings))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, settings)
    for one in file.settings:
        head += _string(one.key) + struct.pack("<I", one.kind) + _value(one.kind, one.value, one.inner)
    for info in file.tensors:
        head += _string(info.name) + struct.pack(
            f"<I{len(info.dims)}QIQ", len(info.dims), *info.dims, info.kind, info.offset
        )
    return head + b"\0" * (-len(head) % ALIGNMENT) + file.data


def requantised(path: Path, kind: int) -> None:
    """Store the matrices of a file in float32 in another type, by the `gguf` package."""
    package, file = import_module("gguf"), parse(path.read_bytes())
    data = b""
    for info in file.tensors:
        held = file.held(info)
        if info.kind == 0 and len(info.dims) > 1:
            rows = np.frombuffer(held, np.float32).reshape(*reversed(info.dims))
            info.kind, held = kind, package.quantize(rows, package.GGMLQuantizationType(kind)).tobytes()
        info.offset = len(data)
        data += held + b"\0" * (-len(held) % ALIGNMENT)
    file.data = data
    path.write_bytes(assemble(file))


NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 63, 64, 65, 100, 127, 128, 1000, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (b"", b"x", b"llama", b"qwen2", b"qwen3", b"mistral", b"gpt2", b"bert", b"clip", b"default", b"smollm", b"spm",
         b"\x1b[31m", b"a\nb", b"\xff\xfe", b"x" * 100_000, b"../sentinel", b"linear", b"yarn", b"adapter", b"no_vocab",
         b"{{" * 100, b"{% for m in messages %}{{ m }}", "é".encode())  # fmt: skip
EXTRA = ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.logit_scale",
         "llama.attention.key_length", "llama.attention.sliding_window", "llama.rope.dimension_count", "split.count",
         "llama.attention.head_count_kv", "general.type", "general.alignment", "general.file_type", "x", "",
         "tokenizer.ggml.pre", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "general.name",
         "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_space_prefix",
         "llama.vocab_size", "llama.tensor_data_layout", "tokenizer.ggml.precompiled_charsmap",
         "tokenizer.huggingface.json")  # fmt: skip


def spoil_gguf(path: Path, draw: Random) -> str:
    """Change a GGUF file; what was done."""
    whole = path.read_bytes()
    file = parse(whole)
    what = draw.choice(["setting"] * 8 + ["tokens"] * 4 + ["tensor"] * 6 + ["data"] * 2 + ["raw"] * 4)
    if what == "setting":
        what = _spoil_setting(file, draw)
    elif what == "tokens":
        what = _spoil_tokens(file, draw)
    elif what == "tensor":
        what = _spoil_tensor(file, draw)
    elif what == "data":
        start = draw.randrange(len(file.data) - 100)
        new = draw.choice([draw.randbytes(2), b"\xff" * 64, b"\0" * 64, b"\x7f\x80" * 8])
        file.data = file.data[:start] + new + file.data[start + len(new) :]
        what = f"data at {start}"
    else:
        changed, what = _spoil_raw(whole, file, draw)
        path.write_bytes(changed)
        return what
    path.write_bytes(assemble(file))
    return what


def _spoil_setting(file: Gguf, draw: Random) -> str:
    """Change, take away or add a setting."""
    one = draw.choice([s for s in file.settings if s.kind != ARRAY])
    what = draw.choice(["value", "value", "value", "value", "gone", "type", "extra", "extra", "twice", "renamed"])
    if what == "gone":
        file.settings.remove(one)
    elif what == "value":
        one.value = _another(one.kind, one.value, draw)
    elif what == "type":
        one.kind = draw.choice([*SCALARS, STRING])
        one.value = _another(one.kind, one.value, draw)
    elif what == "extra":
        key = draw.choice([name for name in EXTRA if file.get(name) is None]).encode()
        kind = draw.choice([4, 4, 5, 6, 7, STRING, ARRAY])
        inner = draw.choice([4, 6, STRING]) if kind == ARRAY else 0
        values = [_another(inner, 0, draw) for _ in range(draw.choice([0, 1, 3, 2000]))] if kind == ARRAY else None
        one = Setting(key, kind, _another(kind, 0, draw) if values is None else values, inner)
        file.settings.append(one)
    elif what == "twice":
        file.settings.append(Setting(one.key, one.kind, _another(one.kind, one.value, draw), one.inner))
    else:
        one.key = draw.choice([*EXTRA, *(name for name in spoilt_names(draw) if "\ud800" not in name)]).encode()
    return f"{what} {one.key[:60]!r} = {one.value!r:.60} of type {one.kind}"


def _another(kind: int, value: Any, draw: Random) -> Any:
    """Another value of a type."""
    if kind == STRING:
        return draw.choice(WORDS)
    if kind == 7:
        return draw.random() < 0.5
    if kind in (6, 12):
        near = [value * 2.0, -value, value / 10] if isinstance(value, float) else []
        return draw.choice([0.0, 1.0, -1.0, 0.5, 4.0, 1e30, 1e-12, 1e38, float("nan"), float("inf"), 1e6, *near])
    near = [value - 1, value + 1, value * 2, value // 2] if type(value) is int else []
    return _held(kind, draw.choice([*NUMBERS, *near, -1, 2**63]))


def _held(kind: int, number: int) -> int:
    """A whole number as the type holds it."""
    bits = 8 * struct.calcsize("<" + SCALARS[kind])
    number %= 2**bits
    return number - 2**bits if SCALARS[kind].islower() and number >= 2 ** (bits - 1) else number


def _spoil_tokens(file: Gguf, draw: Random) -> str:
    """Change a list of the vocabulary: its length, an element, all of it."""
    one = draw.choice([s for s in file.settings if s.kind == ARRAY])
    what = draw.choice(["shorter", "longer", "element", "element", "empty", "gone", "same", "type", "scalar"])
    if what == "shorter":
        del one.value[draw.randrange(max(len(one.value), 1)) :]
    elif what == "longer":
        one.value += (one.value or [0])[:1] * draw.choice([1, 10, 1000])
    elif what == "element" and one.value:
        one.value[draw.randrange(len(one.value))] = _another(one.inner, one.value[0], draw)
    elif what == "empty":
        one.value = []
    elif what == "gone":
        file.settings.remove(one)
    elif what == "same" and one.value:
        one.value = one.value[:1] * len(one.value)
    elif what == "type":
        one.inner = draw.choice([4, 5, 6, STRING])
        one.value = [_another(one.inner, 0, draw) for _ in one.value]
    elif what == "scalar":
        one.kind, one.value, one.inner = 4, 7, 0
    return f"{what} {one.key[:60]!r} of {len(one.value) if one.kind == ARRAY else 0}"


def _spoil_tensor(file: Gguf, draw: Random) -> str:
    """Change what is said of a tensor."""
    info, other = draw.choice(file.tensors), draw.choice(file.tensors)
    what = draw.choice(
        ["name", "dims", "dims", "transposed", "type", "type", "offset", "offset", "gone", "twice", "swapped"]
    )
    if what == "name":
        names = [name for name in spoilt_names(draw) if name.isascii()]
        info.name = draw.choice([other.name, b"rope_freqs.weight", b"blk.9.ffn_up.weight", info.name + b"s",
                                 info.name.removesuffix(b".weight"), *(name.encode() for name in names)])  # fmt: skip
    elif what == "dims":
        sizes = [0, 1, 2, 32, 2**31, 2**63, 2**64 - 1, *info.dims]
        info.dims = [draw.choice(sizes) for _ in range(draw.choice([0, 1, 2, 2, 3, 4, 9]))]
    elif what == "transposed":
        info.dims.reverse()
    elif what == "type":
        info.kind = draw.choice([*SIZES, 12, 14, 31, 40, 99, 2**31])
    elif what == "offset":
        info.offset = draw.choice([0, 1, info.offset + 32, other.offset, len(file.data), 2**40, 2**63, 2**64 - 32])
    elif what == "gone":
        file.tensors.remove(info)
    elif what == "twice":
        file.tensors.append(Info(info.name, list(other.dims), other.kind, other.offset))
    else:
        info.name, other.name = other.name, info.name
    return f"{what} {info.name[:60]!r} {info.dims} type {info.kind} at {info.offset}"


def _spoil_raw(whole: bytes, file: Gguf, draw: Random) -> tuple[bytes, str]:
    """The bytes of a file changed below the level of its parts."""
    head = len(whole) - len(file.data)
    what = draw.choice(
        ["cut", "cut", "long", "flips", "flips", "counts", "version", "magic", "count of a list", "swapped"]
    )
    if what == "cut":
        place = draw.choice(
            [0, 1, 4, 8, 23, 24, head - 1, head, len(whole) - 1, draw.randrange(len(whole)), draw.randrange(head)]
        )
        return whole[:place], f"cut {place}"
    if what == "long":
        return whole + draw.randbytes(draw.choice([1, 1000])), what
    if what == "flips":
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            changed[draw.randrange(head)] = draw.choice([draw.randrange(256), 0, 0x80, 0xFF])
        return bytes(changed), what
    if what == "counts":
        sizes = [0, 1, 10**6, 2**31, 2**40, 2**63, 2**64 - 1]
        counts = draw.choice(sizes + [len(file.tensors)] * 4), draw.choice(sizes + [len(file.settings)] * 4)
        return assemble(file, counts=counts), f"counts {counts}"
    if what == "version":
        version = draw.choice([0, 1, 2, 4, 99, 2**24 * 3, 2**32 - 1])
        return assemble(file, version=version), f"version {version}"
    if what == "magic":
        return draw.choice([b"GGUX", b"FUGG", b"\0\0\0\0", b"ggml"]) + whole[4:], what
    if what == "swapped":  # as a machine of the other byte order writes it
        return whole[:4] + whole[4:8][::-1] + whole[8:], "order of bytes"
    one = draw.choice([s for s in file.settings if s.kind in (ARRAY, STRING)])
    place = whole.index(_string(one.key)) + 8 + len(one.key) + (8 if one.kind == ARRAY else 4)
    count = draw.choice([0, 1, 10**6, 2**31, 2**40, 2**63, 2**64 - 1])
    return whole[:place] + struct.pack("<Q", count) + whole[place + 8 :], f"{count} for the count of {one.key!r}"
