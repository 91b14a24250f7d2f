"""bitsandbytes: NF4 and FP4 in blocks of a row of numbers, and integers of eight bits.

Of four bits, `X.weight` holds two numbers a byte, the first in the high half, `X.weight.absmax` the
scale of each block, `X.weight.quant_map` the sixteen values, and `X.weight.quant_state…` as JSON
what remains. Scales may be quantised themselves (`nested_…`). A weight is value times scale in
float32, cast to the dtype that the state names, as `dequantize_4bit` has it. Of eight bits, `SCB`
is the largest of each row: a weight is `number * SCB * (1/127)`, as in `int8_vectorwise_dequant`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.quantised.packed import Decoded, Packed, QuantisedFolder, four_bit
from secateur.system.json_files import parsed_json

STATES = {"nf4": ".quant_state.bitsandbytes__nf4", "fp4": ".quant_state.bitsandbytes__fp4"}
_FP4 = [value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
VALUES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
}
"""The numbers of each kind. The library has them in its code and does not look at `quant_map`."""
ONE_127TH = 7.874015718698502e-3
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def recognised(source: QuantisedFolder) -> bool:
    """Whether the settings say so or, without settings, parts of that name are there."""
    method = source.settings.get("quant_method")
    loading = any(source.settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    named = any(name.endswith((".weight.absmax", ".SCB")) for name in source.checkpoint.places)
    return method == "bitsandbytes" or (method is None and (loading or named))


def decoded(source: QuantisedFolder) -> tuple[str, Decoded]:
    """The format in words, and every packed matrix."""
    tensors: dict[str, Any] = {}
    for packed in source.packed(".weight.absmax"):
        tensors |= _four_bits(Packed(packed.checkpoint, f"{packed.prefix}.weight"))
    for packed in source.packed(".SCB"):
        tensors |= _eight_bits(Packed(packed.checkpoint, f"{packed.prefix}."))
    kinds = {tensor.stored for tensor in tensors.values() if tensor}
    return f"bitsandbytes {' and '.join(sorted(kinds))}", tensors


def _four_bits(packed: Packed) -> Decoded:
    """A weight in NF4 or FP4. Raises BadCheckpoint where its parts do not fit."""
    kind = next((kind for kind, part in STATES.items() if packed.has(part)), "")
    if not kind:
        raise packed.bad("has an absmax and no quant_state of nf4 or fp4")
    state = _state(packed, STATES[kind])
    shape, block = tuple(state["shape"]), state["blocksize"]
    count = prod(shape)
    if 2 * packed.place("").bytes != count + count % 2:
        raise packed.bad(f"has {packed.place('').bytes} bytes for {count} numbers of 4 bits")
    nested = packed.has(".nested_absmax")
    packed.require(".quant_map", (16,), ["F32"])
    if not torch.equal(packed.tensor(".quant_map"), torch.tensor(VALUES[kind])):
        raise packed.bad(f"has a quant_map of other values than {kind.upper()} has")
    packed.require(".absmax", (-(-count // block),), ["U8"] if nested else ["F32"])
    if nested:
        packed.require(".nested_quant_map", (256,), ["F32"])
        blocks = -(-packed.place(".absmax").shape[0] // state["nested_blocksize"])
        packed.require(".nested_absmax", (blocks,), ["F32"])
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATES[kind])
    decode, stored = partial(_rows, packed, state, shape), kind.upper()
    return packed.dense("", shape, decode, stored, parts)


def _state(packed: Packed, part: str) -> dict[str, Any]:
    """What is stored of a weight as JSON. Raises BadCheckpoint where it is not that."""
    try:
        raw = packed.tensor(part).contiguous().view(-1).view(torch.uint8)
        state = parsed_json(bytes(raw.tolist()).decode())
    except ValueError as error:
        raise packed.bad(f"has a {part.lstrip('.')} that is no JSON") from error
    state = state if isinstance(state, dict) else {}
    shape = state.get("shape")
    sizes = isinstance(shape, list) and bool(shape) and all(isinstance(n, int) for n in shape)
    blocks, nested = [state.get("blocksize")], packed.has(".nested_absmax")
    if nested:
        blocks.append(state.get("nested_blocksize"))
        sizes = sizes and isinstance(state.get("nested_offset"), (int, float))
    even = all(isinstance(size, int) and size > 0 and size % 2 == 0 for size in blocks)
    if not sizes or not even or str(state.get("dtype")) not in DTYPES:
        needed = "shape, blocksize or dtype" + ", or those of its scales" * nested
        raise packed.bad(f"has a {part.lstrip('.')} without {needed}")
    kind = state.get("quant_type")
    if STATES.get(str(kind)) != part or state.get("nested_dtype", "float32") != "float32":
        raise packed.bad(f"has a {part.lstrip('.')} that says {kind}, {state.get('nested_dtype')}")
    return state


def _rows(
    packed: Packed, state: dict[str, Any], shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Rows of a weight, in the dtype that its state names."""
    inside, block = prod(shape[1:]), state["blocksize"]
    first = start * inside // block * block  # where a block begins
    last = min(-(-stop * inside // block) * block, prod(shape))
    stored = packed.tensor("").view(torch.uint8).flatten()[first // 2 : (last + 1) // 2]
    values = four_bit(stored, packed.tensor(".quant_map"), high_first=True)[: last - first]
    scales = _scales(packed, state)[first // block : -(-last // block)]
    padded = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    values = (padded * scales.unsqueeze(-1)).flatten()
    rows = values[start * inside - first : stop * inside - first]
    return rows.to(DTYPES[state["dtype"]]).view(stop - start, *shape[1:])


def _scales(packed: Packed, state: dict[str, Any]) -> Tensor:
    """The scale of every block, float32."""
    scales = packed.tensor(".absmax")
    if not packed.has(".nested_absmax"):
        return scales
    values, block = packed.tensor(".nested_quant_map")[scales.int()], state["nested_blocksize"]
    padded = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    values = (padded * packed.tensor(".nested_absmax").unsqueeze(-1)).flatten()
    return values[: scales.numel()] + torch.tensor(float(state.get("nested_offset", 0.0)))


def _eight_bits(packed: Packed) -> Decoded:
    """A weight in eight-bit integers."""
    shape = packed.place("weight", ["I8"]).shape
    if len(shape) != 2:
        raise packed.bad(f"has weights of shape {list(shape)}; a matrix was wanted")
    packed.require("SCB", shape[:1], ["F32"])
    if packed.has("weight_format") and packed.tensor("weight_format").any():
        raise packed.bad("has weights in the order of a device; rows were wanted (weight_format 0)")

    def decode(start: int, stop: int) -> Tensor:
        rows = packed.tensor("SCB")[start:stop].view(-1, 1)
        return packed.tensor("weight")[start:stop] * rows * ONE_127TH

    return packed.dense("weight", shape, decode, "int8", ("weight", "SCB", "weight_format"))
