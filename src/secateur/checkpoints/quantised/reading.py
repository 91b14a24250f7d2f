"""A quantised checkpoint read as if it were plain, tensor by tensor, without a copy on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.checkpoints.folder import Checkpoint, TensorLocation
from secateur.checkpoints.quantised.base import DenseTensor, PlainSource
from secateur.checkpoints.quantised.formats import read_headers
from secateur.checkpoints.quantised.unpack import bytes_of, other_shape
from secateur.system.json_files import write_json


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are decoded as they are asked for.

    `places` give the shapes of the plain tensors and, as dtype, how they are stored: "NVFP4". They
    lie in no place that could be mapped.
    """

    source: PlainSource
    decoders: dict[str, DenseTensor]

    @property
    def bytes(self) -> int:
        """The size of the plain copy in 16 bits."""
        return sum(bytes_of(tensor, "bfloat16") for tensor in self.source.tensors)

    def tensor(self, name: str) -> Tensor:
        """One tensor, decoded. Raises BadCheckpoint where its shape is another than announced."""
        tensor = self.decoders[name].read()
        if tensor.shape != self.decoders[name].shape:
            raise other_shape(self.decoders[name], tuple(tensor.shape))
        return tensor


def decoded_checkpoint(source: PlainSource) -> DecodedCheckpoint:
    """A source as a checkpoint that decodes its tensors."""
    places = {
        tensor.name: TensorLocation("", 0, tensor.stored_bytes, tensor.shape, tensor.stored)
        for tensor in source.tensors
    }
    decoders = {tensor.name: tensor for tensor in source.tensors}
    return DecodedCheckpoint(source.origin, (), places, source, decoders)


def readable_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, decoded where it is quantised. Raises BadCheckpoint, and
    UnsupportedModel for a format that cannot be read.
    """
    source = read_headers(folder)
    return decoded_checkpoint(source) if isinstance(source, PlainSource) else source


def write_configuration(source: PlainSource, folder: Path) -> None:
    """Write what describes the plain model, its config.json and its code, into a folder."""
    write_json(folder / "config.json", source.config, 2)
    for name, file in source.files.items():
        if name.endswith(".py") and isinstance(file, Path):
            (folder / name).write_bytes(file.read_bytes())
