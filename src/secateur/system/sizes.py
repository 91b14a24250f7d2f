"""Sizes in bytes, as people write them."""

import re
from decimal import Decimal

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


def parse_size(text: str) -> int | None:
    """Bytes for "6GB" or "512 MiB", None for what is no size."""
    found = re.fullmatch(rf"({NUMBER}) ?({'|'.join(SIZES)})", text)
    return round(Decimal(found[1]) * SIZES[found[2]]) if found else None


NUMBER = r"-?[0-9]{1,12}(?:\.[0-9]{1,12})?"
