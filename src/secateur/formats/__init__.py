"""How a checkpoint can be written for others to load, a file each. A new format is a file here and its line in `FORMATS`."""

from secateur.errors import UnknownName
from secateur.formats.base import Format

FORMATS: dict[str, Format] = {}


def find_format(name: str) -> Format:
    """The format of that name. Raises UnknownName."""
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS)
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "find_format"]
