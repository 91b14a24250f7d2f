"""The graph of an ONNX file: its constants, and the nodes that multiply by constant matrices.

Numbers that lie in a file beside the graph are mapped; of the graph itself the protobuf is loaded,
by the package onnx. A product is a MatMul or Gemm by a constant, behind Transpose, Cast and
Identity too, or by what DequantizeLinear makes of one; or ONNX Runtime's MatMulNBits. Graphs inside
a graph (If, Loop) are gone through as well. Other operators that multiply by matrices are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.quantised.packed import unpacked
from secateur.errors import LIBRARY_ERRORS, BadCheckpoint, UnsupportedModel, in_one_line

PLAIN = {
    "FLOAT": (torch.float32, "F32"),
    "FLOAT16": (torch.float16, "F16"),
    "BFLOAT16": (torch.bfloat16, "BF16"),
    "DOUBLE": (torch.float64, "F64"),
}
BYTES = {"UINT8": torch.uint8, "INT8": torch.int8}
HALVES = {"UINT4": 0, "INT4": 16}
"""Numbers of four bits, two a byte, and what is taken from one that is 8 or more."""
OTHERS = (
    *("MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("MatMulBnb4", "MatMulFpQ4", "FusedMatMul", "FusedGemm", "MoE", "QMoE", "QAttention"),
)
"""Operators that multiply by matrices too, and are not read."""
THROUGH = ("Transpose", "Cast", "Identity")
"""Operators behind which a constant is the same matrix, turned or not."""


class Place(NamedTuple):
    """A constant of a graph: its protobuf, dtype by name and shape, and the folder of its file."""

    proto: Any
    dtype: str
    shape: tuple[int, ...]
    folder: Path

    @property
    def bytes(self) -> int:
        """How many bytes its numbers take. Raises BadCheckpoint for a dtype that is not read."""
        count = prod(self.shape)
        if self.dtype in HALVES:
            return -(-count // 2)
        if self.dtype not in PLAIN and self.dtype not in BYTES:
            raise BadCheckpoint(f"{self.proto.name} is stored as {self.dtype}, which is not read.")
        return count * self.kind.itemsize

    @property
    def kind(self) -> torch.dtype:
        """The dtype in which its bytes are taken."""
        return PLAIN[self.dtype][0] if self.dtype in PLAIN else BYTES.get(self.dtype, torch.uint8)

    def tensor(self) -> Tensor:
        """Its numbers, mapped where they lie beside the graph; of four bits as int8. Raises
        BadCheckpoint where they do not make its shape.
        """
        raw = _raw(self, self.bytes)
        if self.dtype not in HALVES:
            return raw.view(self.kind).view(self.shape)
        numbers = unpacked(raw, 4, prod(self.shape)).to(torch.int8)
        numbers[numbers > 7] -= HALVES[self.dtype]
        return numbers.view(self.shape)


class Product(NamedTuple):
    """A node that multiplies by constants, or makes what is multiplied by: its constant inputs, its
    attributes, and whether the matrix lies `[out, in]` in them, not `[in, out]`.
    """

    node: Any
    inputs: tuple[Place | None, ...]
    attributes: Mapping[str, Any]
    turned: bool

    def bad(self, what: str) -> BadCheckpoint:
        """What to raise where its constants do not fit."""
        return BadCheckpoint(f"{self.node.op_type} {self.node.name!r} {what}. Export it again.")


def opened(file: Path) -> Any:
    """The graph of a file, without what lies beside it."""
    try:
        onnx = import_module("onnx")
    except ImportError as error:
        raise UnsupportedModel(
            f"Reading {file} needs the package onnx: pip install 'secateur[onnx]'."
        ) from error
    message = import_module("google.protobuf.message")
    try:
        return onnx.load(str(file), load_external_data=False).graph
    except (*LIBRARY_ERRORS, message.Error) as error:
        raise BadCheckpoint(
            f"{file} is no sound ONNX file ({in_one_line(error)}). It may be cut short; fetch it "
            "again."
        ) from error


def products(graph: Any, outer: Mapping[str, Any], folder: Path) -> Iterator[Product]:
    """The nodes of a graph, and of those inside it, that multiply by constant matrices."""
    if not all(isinstance(text, str) for text in _texts(graph)):
        raise BadCheckpoint(
            f"A graph in {folder} has a name that is no text. It may be spoilt; export it again."
        )
    constants = {**outer, **{one.name: one for one in graph.initializer}}
    for node in graph.node:
        attributes = {one.name: one for one in node.attribute}
        if node.op_type == "Constant" and "value" in attributes and node.output:
            attributes["value"].t.name = node.output[0]
            constants[node.output[0]] = attributes["value"].t
    makers = {node.output[0]: node for node in graph.node if node.output}
    for node in graph.node:
        for attribute in node.attribute:
            own = [attribute.g] if attribute.HasField("g") else []
            for inner in (*own, *attribute.graphs):
                yield from products(inner, constants, folder)
        if node.op_type in ("MatMul", "Gemm", "MatMulNBits"):
            product = _product(node, constants, makers, folder)
            yield from () if product is None else (product,)
        elif node.op_type in OTHERS and any(name in constants for name in node.input):
            raise UnsupportedModel(
                f"{node.name!r} multiplies by {node.op_type}, which is not read; MatMul, Gemm, "
                "MatMulNBits and DequantizeLinear are."
            )


def _texts(graph: Any) -> Iterator[Any]:
    """The names in a graph; protobuf gives bytes for those that are no UTF-8."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for constant in graph.initializer:
        yield constant.name
        for entry in constant.external_data:
            yield from (entry.key, entry.value)


def _product(
    node: Any, constants: Mapping[str, Any], makers: Mapping[str, Any], folder: Path
) -> Product | None:
    """What a node multiplies by; None where that is computed."""
    name, turned = _second_input(node), False
    passed = set[str]()  # nodes that make one another make nothing
    while name not in constants and (maker := makers.get(name)) and name not in passed:
        passed.add(name)
        order = next((list(one.ints) for one in maker.attribute if one.name == "perm"), [1, 0])
        swapped = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
        if not maker.input:
            return None
        if maker.op_type == "DequantizeLinear" and maker.input[0] in constants:
            places = _places(maker.input, constants, folder)
            return Product(maker, places, _attributes(maker), turned ^ _transposed(node))
        if maker.op_type not in THROUGH or (maker.op_type == "Transpose" and order != swapped):
            return None
        turned ^= maker.op_type == "Transpose"
        name = maker.input[0]
    if name not in constants or len(constants[name].dims) < 2:
        return None
    if node.op_type != "MatMulNBits":
        return Product(node, _places([name], constants, folder), {}, turned ^ _transposed(node))
    return Product(node, _places(node.input[1:], constants, folder), _attributes(node), False)


def _second_input(node: Any) -> str:
    """What a product is by. Raises BadCheckpoint for one that has no second input."""
    if len(node.input) < 2:
        raise BadCheckpoint(
            f"{node.op_type} {node.name!r} has {len(node.input)} inputs; 2 are wanted at least. "
            "Export it again."
        )
    return node.input[1]


def _transposed(node: Any) -> bool:
    """Whether a Gemm takes its matrix as `[out, in]`."""
    return any(one.name == "transB" and one.i for one in node.attribute)


def _attributes(node: Any) -> dict[str, Any]:
    return {one.name: one.i for one in node.attribute}


def _places(
    names: Sequence[str], constants: Mapping[str, Any], folder: Path
) -> tuple[Place | None, ...]:
    """The constants of such names, None for inputs that are left out."""
    kinds = import_module("onnx").TensorProto.DataType
    found = []
    for name in names:
        one = constants.get(name)
        if one is None and name:
            raise BadCheckpoint(
                f"{name} belongs to a packed matrix and is no constant of the graph."
            )
        if one is None:
            found.append(None)
            continue
        if any(size < 0 for size in one.dims):
            raise BadCheckpoint(f"{name} has the shape {list(one.dims)}. Export it again.")
        known = one.data_type in kinds.values()
        dtype = kinds.Name(one.data_type) if known else "an unknown dtype"
        found.append(Place(one, dtype, tuple(one.dims), folder))
    return tuple(found)


def _raw(place: Place, size: int) -> Tensor:
    """The bytes of a constant, uint8 [size]. Raises BadCheckpoint where they are not there."""
    proto = place.proto
    if proto.data_location != proto.EXTERNAL:
        data = proto.raw_data
        if not data:
            try:
                data = import_module("onnx").numpy_helper.to_array(proto).tobytes()
            except LIBRARY_ERRORS as error:
                why = in_one_line(error)
                raise BadCheckpoint(f"{proto.name} cannot be read: {why}.") from error
        if len(data) != size:
            raise BadCheckpoint(f"{proto.name} has {len(data)} bytes; {size} were wanted.")
        return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    said = {one.key: one.value for one in proto.external_data}
    location, start = Path(said.get("location", "")), said.get("offset", "0")
    file = place.folder / location
    inside = not location.is_absolute() and ".." not in location.parts and file.is_file()
    if not inside or not start.isdecimal() or int(start) + size > file.stat().st_size:
        raise BadCheckpoint(
            f"{proto.name} lies at byte {start} of {str(location)!r}, and {size} bytes are not "
            "there. Put the file that was written with the graph beside it."
        )
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.memmap(file, np.uint8, "c", int(start), (size,)))
