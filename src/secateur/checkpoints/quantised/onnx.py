"""ONNX: the constant matrices that a graph multiplies by, plain and in few bits, for looking at.

A graph is no checkpoint of transformers: its constants have names of the exporter, and lie as its
operators want them. Here each becomes `[…, out, in]`, whatever multiplies by it (`onnx_graph`).
Of MatMulNBits, `B` uint8 [out, groups, bytes] holds the numbers of a group from the lowest bits on;
zeros are packed as these, or the middle, and a weight is `(number - zero) * scale`; where they are
floats it is `number * scale - zero * scale`, as ONNX Runtime computes it. Its products with the
identity are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.folder import MOST_NAME
from secateur.checkpoints.no_weights import INDEX, SINGLE
from secateur.checkpoints.quantised.base import DenseTensor, PlainSource
from secateur.checkpoints.quantised.onnx_graph import (
    BYTES,
    HALVES,
    PLAIN,
    Place,
    Product,
    opened,
    products,
)
from secateur.checkpoints.quantised.packed import PIECE, ROWS, pieces, unpacked
from secateur.errors import BadCheckpoint, UnsupportedModel

SUFFIX = ".onnx"


def onnx_file(place: Path) -> Path | None:
    """The ONNX file that is meant: the place itself, or the one in a folder without other weights;
    None where there is none. Raises BadCheckpoint for several.
    """
    if place.is_file():
        return place if place.suffix.lower() == SUFFIX else None
    if not place.is_dir() or any((place / name).exists() for name in (SINGLE, INDEX)):
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise BadCheckpoint(f"{place} holds several ONNX files ({names}). Name one of them.")
    return next(iter(files), None)


def onnx_source(file: Path) -> PlainSource:
    """The matrices of an ONNX file as the tensors of a checkpoint, without a configuration.

    Raises UnsupportedModel without the package onnx and for operators that are not read,
    BadCheckpoint.
    """
    graph = opened(file)
    tensors: dict[str, DenseTensor] = {}
    weights = dict[int, Place]()
    for product in products(graph, {}, file.parent):
        weight = next(place for place in product.inputs if place is not None)
        if id(weight.proto) not in weights:  # a head that is tied to embeddings is one matrix
            weights[id(weight.proto)] = weight
            tensor = _matrix(product, _name(product.node.name, weight.proto.name, tensors))
            tensors[tensor.name] = tensor
    if not tensors:
        raise BadCheckpoint(f"{file} multiplies by no constant matrix; a model was wanted.")
    kinds = dict.fromkeys(tensor.stored for tensor in tensors.values())
    words = f"ONNX ({', '.join(kinds)})"
    return PlainSource(words, file, (file,), {}, tuple(tensors.values()), {})


def _name(node: str, weight: str, taken: Mapping[str, Any]) -> str:
    """What a matrix is called: by the path of modules in the name of its node, else as it is."""
    *path, _ = node.strip("/").split("/")
    name = ".".join([*path, "weight"]) if path else weight
    name = weight if name in taken else name
    name = f"{weight}.{len(taken)}" if name in taken else name  # graphs inside have their own names
    if not name.isprintable() or not 0 < len(name) <= MOST_NAME or name in taken:
        raise BadCheckpoint(f"A matrix has the name {name[:80]!r}, which is none. Export it again.")
    return name


def _matrix(product: Product, name: str) -> DenseTensor:
    """The matrix of a product, `[…, out, in]`."""
    if product.node.op_type == "MatMulNBits":
        grouped = _grouped(product)
        size = sum(place.bytes for place in product.inputs if place is not None)
        rows, step = grouped.out, max(PIECE // max(grouped.inside, 1) // ROWS, 1) * ROWS
        decode = partial(_rows, grouped)
        every = partial(pieces, decode, rows, step)
        stored = f"MatMulNBits {grouped.bits}-bit, groups of {grouped.size}"
        shape = (rows, grouped.inside)
        return DenseTensor(name, shape, partial(decode, 0, rows), stored, size, every)
    first = product.inputs[0]
    assert first is not None
    shape = first.shape if product.turned else (*first.shape[:-2], *first.shape[:-3:-1])
    if product.node.op_type == "DequantizeLinear":
        stored = f"DequantizeLinear {first.dtype.lower()}"
        read = partial(_dequantised, product, first, *_scales(product, first))
    elif first.dtype in PLAIN:
        stored, read = PLAIN[first.dtype][1], first.tensor
    else:
        raise product.bad(f"has a matrix in {first.dtype}; one of {', '.join(PLAIN)} was wanted")
    size = sum(place.bytes for place in product.inputs if place is not None)
    return DenseTensor(name, shape, partial(_turned, read, product.turned), stored, size)


def _turned(read: Callable[[], Tensor], turned: bool) -> Tensor:
    return read() if turned else read().transpose(-1, -2)


class Grouped(NamedTuple):
    """A matrix of MatMulNBits: its parts, its sizes, and how many numbers share a scale."""

    numbers: Place
    scales: Place
    zeros: Place | None
    out: int
    inside: int
    bits: int
    size: int


def _grouped(product: Product) -> Grouped:
    """The matrix of a MatMulNBits. Raises BadCheckpoint where its constants do not fit each other,
    UnsupportedModel for groups that are named input by input.
    """
    numbers, scales, zeros, order = (*product.inputs, None, None, None)[:4]
    names = {"N": 0, "K": 0, "bits": 4, "block_size": 0}
    out, inside, bits, size = (product.attributes.get(name, it) for name, it in names.items())
    if order is not None:
        raise UnsupportedModel(
            f"MatMulNBits {product.node.name!r} names the group of each input (g_idx), which is "
            "not read. Quantise without reordering."
        )
    if numbers is None or scales is None or min(out, inside, size) < 1 or not 2 <= bits <= 8:
        raise product.bad(f"has {bits} bits, groups of {size}, and a matrix of {out} × {inside}")
    groups, zero_bytes = -(-inside // size), 0
    size_of_all = out * groups * -(-size * bits // 8)
    wanted: dict[str, tuple[Place, tuple[str, ...], int]] = {
        "B": (numbers, ("UINT8",), size_of_all)
    }
    wanted["scales"] = (scales, tuple(PLAIN), out * groups)
    if zeros is not None:
        packed = zeros.dtype == "UINT8"
        zero_bytes = out * (-(-groups * bits // 8) if packed else groups)
        wanted["zero_points"] = (zeros, ("UINT8", *PLAIN), zero_bytes)
    for part, (place, dtypes, count) in wanted.items():
        if place.dtype not in dtypes or prod(place.shape) != count:
            raise product.bad(
                f"has {part} {place.dtype} {list(place.shape)}; {count} {' or '.join(dtypes)} were "
                f"wanted for {out} × {inside} in groups of {size}"
            )
    return Grouped(numbers, scales, zeros, out, inside, bits, size)


def _rows(grouped: Grouped, start: int, stop: int) -> Tensor:
    """Rows [count, in] of a matrix of MatMulNBits, in float32, cast to the dtype of its scales."""
    out, bits = grouped.out, grouped.bits
    groups = -(-grouped.inside // grouped.size)
    words = grouped.numbers.tensor().view(out, groups, -1)[start:stop]
    scales = grouped.scales.tensor().view(out, groups, 1)[start:stop]
    numbers, factors = unpacked(words, bits, grouped.size).float(), scales.float()
    if grouped.zeros is None:
        values = (numbers - 2 ** (bits - 1)) * factors
    else:
        own = grouped.zeros.tensor().view(out, -1)[start:stop]
        if own.dtype == torch.uint8:
            values = (numbers - unpacked(own, bits, groups).unsqueeze(-1)) * factors
        else:
            values = numbers * factors - own.float().unsqueeze(-1) * factors
    return values.flatten(1)[:, : grouped.inside].to(scales.dtype)


def _scales(product: Product, first: Place) -> tuple[int, int]:
    """Along which dimension of a DequantizeLinear scales change, and how many numbers share one; 0
    for one that shares all. Raises BadCheckpoint where they do not fit.
    """
    _, scales, zeros = (*product.inputs, None)[:3]
    axis, size = product.attributes.get("axis", 1), product.attributes.get("block_size", 0)
    axis = axis + len(first.shape) if axis < 0 else axis
    if scales is None or scales.dtype not in PLAIN or first.dtype not in (*BYTES, *HALVES):
        raise product.bad(f"has numbers in {first.dtype}, and scales in {scales and scales.dtype}")
    if prod(scales.shape) == 1:
        axis, size, wanted = 0, 0, scales.shape
    elif 0 <= axis < len(first.shape):
        many = -(-first.shape[axis] // size) if size > 0 else first.shape[axis]
        blocks = (*first.shape[:axis], many, *first.shape[axis + 1 :])
        wanted, size = (blocks, size) if size > 0 else ((many,), 1)
    else:
        raise product.bad(f"has scales along dimension {axis} of {list(first.shape)}")
    if scales.shape != wanted or (zeros and (zeros.shape, zeros.dtype) != (wanted, first.dtype)):
        raise product.bad(
            f"has scales {list(scales.shape)} for {first.dtype} {list(first.shape)}; "
            f"{list(wanted)} was wanted, for zeros too"
        )
    return axis, size


def _dequantised(product: Product, first: Place, axis: int, size: int) -> Tensor:
    """The matrix of a DequantizeLinear as it lies, in the dtype of its scales."""
    _, scales, zeros = (*product.inputs, None)[:3]
    assert scales is not None
    values, factors = first.tensor().float(), scales.tensor()
    places = torch.arange(first.shape[axis]) // max(size, 1)

    def each(one: Tensor) -> Tensor:
        if not size:
            return one.reshape(())
        if one.ndim == 1:
            return one.view(-1, *[1] * (len(first.shape) - axis - 1))
        return one.index_select(axis, places)

    if zeros is not None:
        values = values - each(zeros.tensor().float())
    return (values * each(factors.float())).to(factors.dtype)
