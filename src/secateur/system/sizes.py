"""Sizes in bytes, as people write and read them."""

import re
from collections.abc import Sequence
from decimal import Decimal

from secateur.errors import UnknownName

SIZES = {
    "TiB": 2**40,
    "TB": 10**12,
    "GiB": 2**30,
    "GB": 10**9,
    "MiB": 2**20,
    "MB": 10**6,
    "KiB": 2**10,
    "kB": 10**3,
    "B": 1,
}
NUMBER = r"-?[0-9]{1,12}(?:\.[0-9]{1,12})?"


def parse_size(text: str) -> int | None:
    """Bytes for "6GB" or "512 MiB", None for what is no size."""
    match = re.fullmatch(rf"({NUMBER}) ?({'|'.join(SIZES)})", text)
    return round(Decimal(match[1]) * SIZES[match[2]]) if match else None


def find_size(text: str | int | None) -> int | None:
    """Bytes for "6GB", "512MiB" or a plain number; None for none. Raises UnknownName."""
    if text is None or isinstance(text, int):
        return text
    size = int(text) if text.isdecimal() else parse_size(text.strip())
    if size is None or size < 0:
        raise UnknownName("size", text, ["6GB", "512MiB", "6000000000"])
    return size


def in_words(
    count: int, units: Sequence[str] = ("GiB", "MiB", "KiB"), form: str = ".2f", least: float = 1.0
) -> str:
    """Bytes in the first of the units of which they make `least`, else in the last: "1.50 GiB"."""
    unit = next((unit for unit in units if count >= least * SIZES[unit]), units[-1])
    return f"{count / SIZES[unit]:{form}} {unit}"
