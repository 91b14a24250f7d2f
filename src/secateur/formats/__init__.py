"""How a checkpoint can be written for others to load. A new format is a file here and its line in `FORMATS`."""

from pathlib import Path

from secateur.errors import UnknownName
from secateur.formats.base import Format
from secateur.formats.compressed_tensors import sparse_24_bitmask, sparse_bitmask
from secateur.formats.packed import packed
from secateur.formats.tensorrt_llm import tensorrt_llm

FORMATS: dict[str, Format] = {
    "packed": packed,
    "sparse-24-bitmask": sparse_24_bitmask,
    "sparse-bitmask": sparse_bitmask,
    "tensorrt-llm": tensorrt_llm,
}


def find_format(name: str) -> Format:
    """The format of that name. Raises UnknownName."""
    if name not in FORMATS:
        raise UnknownName("format", name, ["dense", *FORMATS])
    return FORMATS[name]


def format_of(folder: Path) -> str | None:
    """The format that a folder is in, None for dense checkpoints and all else."""
    return next((name for name, known in FORMATS.items() if known.holds is not None and known.holds(folder)), None)


__all__ = ["FORMATS", "Format", "find_format", "format_of"]
