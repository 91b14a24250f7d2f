"""Forms of a checkpoint for others to load. A new one is a file here and its line in `FORMATS`."""

from pathlib import Path

from secateur.deployment.formats import (
    compressed_tensors,
    compressed_values,
    gguf,
    onnx,
    packed,
    tensorrt_llm,
)
from secateur.deployment.formats.base import Format

FORMATS: dict[str, Format] = {
    "packed": packed.packed,
    "compressed-tensors": compressed_values.compressed_tensors,
    "gguf": gguf.gguf,
    "onnx": onnx.onnx,
    "tensorrt-llm": tensorrt_llm.tensorrt_llm,
    "sparse-24-bitmask": compressed_tensors.sparse_24_bitmask,
    "sparse-bitmask": compressed_tensors.sparse_bitmask,
}


def format_of(folder: Path) -> str | None:
    """The format that a folder is in, None for dense checkpoints and all else."""
    names = (name for name, known in FORMATS.items() if known.holds and known.holds(folder))
    return next(names, None)
