"""torchao: tensors with a class of their own, taken apart into parts, as transformers saves them.

Of a weight `m.weight` the parts lie in `m._weight_qdata`, `m._weight_scale` and
`m._weight_zero_point`; which class it had, the dtype of its numbers and the block that shares a
scale stand as JSON in the metadata of the shards, under the weight's name. Integers are `(number -
zero) * scale`, the difference in that dtype, the product in the wider of it and the scale's, as
`dequantize_affine` has it; FP8 is a product in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.checkpoints.folder import FLOATS
from secateur.checkpoints.quantised.packed import (
    FLOAT8,
    Decoded,
    Packed,
    QuantisedFolder,
    Steps,
    eight_bit,
    scale_steps,
    scaled,
    spread,
)
from secateur.errors import UnsupportedModel, in_one_line
from secateur.system.json_files import parsed_json

METHOD = "torchao"
QDATA, SCALE, ZERO = "qdata", "scale", "zero_point"
PRE_SCALE = "act_pre_scale"
PARTS = (QDATA, SCALE, ZERO, "act_quant_scale", "act_quant_zero_point")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Weight(NamedTuple):
    """A weight in parts: its module with a dot, its own name, and what the metadata say of it."""

    packed: Packed
    last: str
    dtype: torch.dtype
    attributes: Mapping[str, Any]

    def part(self, name: str) -> str:
        """What a part is called in the module."""
        return f"_{self.last}_{name}"

    def has(self, name: str) -> bool:
        """Whether there is such a part."""
        return self.packed.has(self.part(name))

    def tensor(self, name: str) -> Tensor:
        """A part, mapped from its shard."""
        return self.packed.tensor(self.part(name))

    def dense(self, decode: Callable[[int, int], Tensor], stored: str) -> Decoded:
        """The plain weight."""
        shape = self.packed.place(self.part(QDATA)).shape
        return self.packed.dense(self.last, shape, decode, stored, list(map(self.part, PARTS)))


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, parts of that name are there."""
    method = source.settings.get("quant_method")
    return method == METHOD or (method is None and any(source.packed("._weight_qdata")))


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every weight in parts. Raises UnsupportedModel for other classes."""
    tensors: dict[str, Any] = {}
    for name, text in _metadata(source).items():
        module, dot, last = name.rpartition(".")
        if name == "tensor_names" or not dot:
            continue
        packed = Packed(source.checkpoint, f"{module}.")
        kind, attributes = _described(packed, last, text)
        if kind != "Tensor":
            tensors |= _weight(packed, last, kind, attributes)
    for packed in source.packed(f"_{QDATA}"):
        if f"{packed.prefix}_{QDATA}" not in tensors:
            raise packed.bad(
                "is one of torchao's, and the metadata of the shards do not describe it"
            )
    kinds = {tensor.stored for tensor in tensors.values() if tensor}
    return " and ".join(sorted(kinds)), tensors


def _metadata(source: QuantisedFolder) -> dict[str, str]:
    """What the shards say of their tensors; each shard says it of all."""
    said: dict[str, str] = {}
    for shard in source.checkpoint.shards:
        with safe_open(source.checkpoint.folder / shard, framework="pt") as opened:
            said |= opened.metadata() or {}
    return said


def _described(packed: Packed, last: str, text: str) -> tuple[str, Mapping[str, Any]]:
    """The class of a tensor, and its attributes. Raises BadCheckpoint where the text is no such
    description.
    """
    try:
        value = parsed_json(text)
    except ValueError as error:
        raise packed.bad(
            f"has a {last} whose description is no JSON ({in_one_line(error)})"
        ) from error
    attributes = value.get("_data", {}) if isinstance(value, dict) else None
    if not isinstance(attributes, dict):
        raise packed.bad(f"has a {last} that is described as {text[:80]!r}; an object was wanted")
    return str(value.get("_type")), attributes


def _weight(packed: Packed, last: str, kind: str, attributes: Mapping[str, Any]) -> Decoded:
    """The plain weight of one in parts. Raises BadCheckpoint where they do not fit."""
    if kind not in KINDS:
        raise UnsupportedModel(
            f"{packed.prefix}{last} in {packed.checkpoint.folder} is a {kind} of torchao; one of "
            f"{', '.join(KINDS)} was wanted. Name the unquantised model."
        )
    if packed.has(f"_{last}_{PRE_SCALE}"):
        raise packed.bad(f"has an {PRE_SCALE}, which would have to go into what is before it")
    named = attributes.get("dtype")
    dtype = DTYPES.get(str(named.get("_data"))) if isinstance(named, dict) else None
    if dtype is None:
        raise packed.bad(f"has a {last} of dtype {named}; one of {', '.join(DTYPES)} was wanted")
    return KINDS[kind](Weight(packed, last, dtype, attributes))


def _integers(weight: Weight) -> Decoded:
    """A weight whose numbers are a byte each, of eight bits or fewer."""
    packed, block = weight.packed, weight.attributes.get("block_size")
    shape = packed.place(weight.part(QDATA), ["I8"]).shape
    if (
        not isinstance(block, list)
        or len(block) != len(shape)
        or len(shape) < 2
        or not all(type(size) is int and size > 0 for size in block)
        or any(size % each for size, each in zip(shape, block, strict=True))
    ):
        raise packed.bad(f"has {weight.last} {list(shape)} in blocks of {block}")
    groups = tuple(size // each for size, each in zip(shape, block, strict=True))
    packed.require(weight.part(SCALE), groups, list(FLOATS))
    if weight.has(ZERO):
        packed.require(weight.part(ZERO), groups, ["I8", *FLOATS])
    named = weight.attributes.get("target_dtype")
    stored = f"torchao {named.get('_data') if isinstance(named, dict) else 'int8'}"
    if any(each not in (1, size) for size, each in zip(shape, block, strict=True)):
        stored += f", groups of {block[-1]}"
    return weight.dense(partial(_integer_rows, weight, tuple(block)), stored)


def _integer_rows(weight: Weight, steps: Steps, start: int, stop: int) -> Tensor:
    """Rows of a weight in integers, or experts, in its own dtype."""
    numbers, scales = weight.tensor(QDATA), weight.tensor(SCALE)
    values = numbers[start:stop].to(weight.dtype)
    if weight.has(ZERO):
        zeros = weight.tensor(ZERO).to(weight.dtype)
        values = values - spread(zeros, numbers.shape, steps, start, stop)
    values = values.to(torch.promote_types(weight.dtype, scales.dtype))
    return scaled(values, scales, numbers.shape, steps, start).to(weight.dtype)


def _floats(weight: Weight) -> Decoded:
    """A weight in eight-bit floats."""
    packed = weight.packed
    shape = packed.place(weight.part(QDATA), list(FLOAT8)).shape
    scales = packed.place(weight.part(SCALE), list(FLOATS)).shape
    steps = scale_steps(shape, scales)
    if len(shape) < 2 or not all(steps):
        raise packed.bad(f"has scales of shape {list(scales)} for {weight.last} {list(shape)}")
    return weight.dense(partial(_float_rows, weight, steps), "torchao float8")


def _float_rows(weight: Weight, steps: Steps, start: int, stop: int) -> Tensor:
    """Rows of a weight in eight-bit floats, or experts, in its own dtype."""
    numbers, scales = weight.tensor(QDATA), weight.tensor(SCALE).float()
    values = eight_bit(numbers[start:stop])
    return scaled(values, scales, numbers.shape, steps, start).to(weight.dtype)


KINDS: dict[str, Callable[[Weight], Decoded]] = {
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
    "Float8Tensor": _floats,
}
"""By the name of the class: what reads it."""
