"""The weight of a module in each quantised format, from the published descriptions and the code of their libraries.

Bits are taken one by one. A function gets the parts of a module by their names and what config.json says of it, and
gives the weight in the dtype in which the library decodes it; AssertionError or another error where the parts are not
what the format wants. tests/reference/test_reference.py holds them against the libraries' own digests.
"""

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]
HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*HALVES, *(-half for half in HALVES)])
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WORDS = (torch.int32, torch.uint32)


def numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` numbers of so many bits in each row of integers, read as one stream from the lowest bit on."""
    raw = words.contiguous().flatten().view(torch.uint8).numpy().reshape(*words.shape[:-1], -1)
    stream = np.unpackbits(raw, axis=-1, bitorder="little").astype(np.int32)
    assert stream.shape[-1] >= count * bits
    fields = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return torch.from_numpy((fields << np.arange(bits)).sum(-1))


def each(scales: Tensor, shape: tuple[int, ...], block: Any = None) -> Tensor:
    """A scale for every weight: one for all, for a row, for a block, or for equal parts of a dimension."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.ndim == 1:
        assert scales.shape == shape[:1]
        return scales.reshape(-1, *[1] * (len(shape) - 1))
    assert scales.ndim == len(shape)
    named = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    blocks = [0] * (len(shape) - 2) + (block if named else [0, 0])
    for dimension, (size, count, step) in enumerate(zip(shape, scales.shape, blocks, strict=True)):
        if step and -(-size // step) == count:
            scales = scales.index_select(dimension, torch.arange(size) // step)
        else:
            assert count
            assert size % count == 0
            scales = scales.repeat_interleave(size // count, dimension)
    return scales


def power(exponents: Tensor) -> Tensor:
    """Powers of two for exponents in a byte: 127 is one, 255 no number."""
    assert exponents.dtype in (torch.uint8, torch.float8_e8m0fnu)
    whole = exponents.view(torch.uint8).double()
    return torch.where(whole == 255, torch.nan, torch.exp2(whole - 127)).float()


def halves(packed: Tensor) -> Tensor:
    """Two four-bit floats a byte, the low half first."""
    assert packed.dtype == torch.uint8
    return E2M1[numbers(packed, 4, 2 * packed.shape[-1])]


def grouped(values: Tensor, scales: Tensor) -> Tensor:
    """Values times the scale of their group in the last dimension."""
    assert values.shape[:-1] == scales.shape[:-1]
    assert scales.shape[-1]
    assert values.shape[-1] % scales.shape[-1] == 0
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], -1)


def _words_and_scales(parts: Parts) -> None:
    assert "weight" not in parts
    assert parts["qweight"].dtype in WORDS
    assert parts["qzeros"].dtype in WORDS
    assert parts["scales"].dtype in FLOATS


def gptq(parts: Parts, settings: Settings) -> Tensor:
    """GPTQModel's TorchLinear; in the first format zeros are stored less one, and the words get a one in each field."""
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    _words_and_scales(parts)
    (rows, out), groups = qweight.shape, len(scales)
    bits = 32 * qzeros.shape[1] // out
    inputs = len(parts["g_idx"]) if "g_idx" in parts else rows * 32 // bits
    assert scales.shape == (groups, out)
    assert qzeros.shape == (groups, -(-out * bits // 32))
    assert rows == -(-inputs * bits // 32)
    assert bits in (2, 3, 4, 8)
    packing = settings.get("packing_format") or settings.get("checkpoint_format") or settings.get("format") or "gptq"
    zeros = numbers(qzeros, bits, out)
    if packing in ("gptq", "auto_round:auto_gptq"):
        if bits != 3:
            ones = np.uint32(sum(1 << place for place in range(0, 32, bits)))
            raised = qzeros.contiguous().view(torch.int32).numpy().view(np.uint32) + ones
            zeros = numbers(torch.from_numpy(raised.view(np.int32)), bits, out)
        else:
            zeros = (zeros + 1) % 8
    else:
        assert packing in ("gptq_v2", "auto_round", "auto_round:gptqmodel")
    index = torch.arange(inputs) // (inputs // groups)
    if "g_idx" in parts:
        assert parts["g_idx"].dtype in WORDS
        index = parts["g_idx"].view(torch.int32).long()
    else:
        assert inputs % groups == 0
    assert ((index >= 0) & (index < groups)).all()
    weight = numbers(qweight.T, bits, inputs)
    return scales.T[:, index] * (weight - zeros.T[:, index])


def awq(parts: Parts, settings: Settings) -> Tensor:
    """AutoAWQ's gemm packing: eight columns of a word lie in the order 0 2 4 6 1 3 5 7."""
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    assert str(settings.get("version", "gemm")).lower() == "gemm"
    assert settings.get("bits", settings.get("w_bit", 4)) == 4
    _words_and_scales(parts)
    inputs, words = qweight.shape
    assert scales.shape == (len(scales), 8 * words)
    assert qzeros.shape == (len(scales), words)
    assert inputs % len(scales) == 0

    def ordered(packed: Tensor) -> Tensor:
        stored, columns = numbers(packed, 4, 8 * words), torch.empty(len(packed), 8 * words, dtype=torch.int32)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            columns[:, column::8] = stored[:, place::8]
        return columns

    size = inputs // len(scales)
    difference = ordered(qweight) - ordered(qzeros).repeat_interleave(size, 0)
    return (difference * scales.repeat_interleave(size, 0)).T


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
       1.0)  # fmt: skip
FP4 = [value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor([*FP4, *(0.0 - value for value in FP4)])}


def bitsandbytes(parts: Parts, settings: Settings) -> Tensor:
    """`dequantize_4bit` and `int8_vectorwise_dequant`; the values of NF4 and FP4 are the library's own."""
    weight = parts["weight"]
    if "SCB" in parts:
        assert weight.dtype == torch.int8
        assert parts["SCB"].shape == weight.shape[:1]
        assert parts["SCB"].dtype == torch.float32
        assert not parts.get("weight_format", torch.zeros(1)).any()
        return weight * parts["SCB"].view(-1, 1) * 7.874015718698502e-3
    kind = "nf4" if "weight.quant_state.bitsandbytes__nf4" in parts else "fp4"
    state = json.loads(bytes(parts[f"weight.quant_state.bitsandbytes__{kind}"].flatten().tolist()))
    assert state["quant_type"] == kind
    shape, size = state["shape"], state["blocksize"]
    count = prod(shape)
    codes = numbers(weight.view(torch.uint8).reshape(-1, 1), 4, 2).flip(-1).flatten()
    assert len(codes) == count
    assert torch.equal(parts["weight.quant_map"], TABLES[kind])
    scales = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        assert scales.dtype == torch.uint8
        assert state["nested_dtype"] == "float32"
        assert parts["weight.nested_quant_map"].shape == (256,)
        block = torch.arange(len(scales)) // state["nested_blocksize"]
        assert len(parts["weight.nested_absmax"]) == block[-1] + 1
        scales = parts["weight.nested_quant_map"][scales.int()] * parts["weight.nested_absmax"][block]
        scales = scales + torch.tensor(float(state["nested_offset"]))
    assert scales.dtype == torch.float32
    assert len(scales) == -(-count // size)
    values = TABLES[kind][codes] * scales[torch.arange(count) // size]
    return values.to(getattr(torch, state["dtype"])).view(shape)


def compressed_tensors(parts: Parts, settings: Settings) -> Tensor:
    """`dequantize` of compressed-tensors: (number - zero) * scale in the dtype of the scales."""
    scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
    assert "weight" not in parts or "weight_packed" not in parts
    if "weight_packed" not in parts:
        weight, block = parts["weight"], settings.get("block_structure")
        assert weight.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
        if scales.dtype == torch.uint8:
            scales = power(scales).bfloat16()
        assert scales.dtype in FLOATS
        values = weight.to(scales.dtype)
        if zeros is not None:
            assert zeros.shape == scales.shape
            values = values - each(zeros.to(scales.dtype), values.shape, block)
        return values * each(scales, values.shape, block)
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        factor = power(scales) if scales.dtype == torch.uint8 else scales.float()
        if scales.dtype != torch.uint8 or "weight_global_scale" in parts:
            assert parts["weight_global_scale"].numel() == 1
            assert parts["weight_global_scale"].dtype == torch.float32
            factor = factor / parts["weight_global_scale"].reshape(())
        return grouped(halves(packed), factor).bfloat16()
    bits, (rows, columns) = settings["num_bits"], parts["weight_shape"].tolist()
    assert type(bits) is int
    assert packed.dtype == torch.int32
    assert scales.dtype in FLOATS
    assert packed.shape == (rows, -(-columns * bits // 32))
    values = numbers(packed, bits, columns).to(scales.dtype) - 2 ** (bits - 1)
    if zeros is not None:
        if zeros.dtype == torch.int32:
            assert len(zeros) == -(-rows * bits // 32)
            zeros = numbers(zeros.T, bits, rows).T - 2 ** (bits - 1)
        assert zeros.shape == scales.shape
        values = values - _in_order(parts, zeros.to(scales.dtype), (rows, columns))
    return values * _in_order(parts, scales, (rows, columns))


def _in_order(parts: Parts, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    if "weight_g_idx" not in parts:
        return each(scales, shape)
    index = parts["weight_g_idx"].long()
    assert index.shape == shape[1:]
    assert ((index >= 0) & (index < scales.shape[1])).all()
    return scales[:, index]


def mlx(parts: Parts, settings: Settings) -> Tensor:
    """`mlx.core.dequantize`: number * scale + bias, or a float times a scale in a byte."""
    weight, scales, mode = parts["weight"], parts["scales"], settings.get("mode", "affine")
    bits, size = settings.get("bits", 4), settings.get("group_size", 64)
    bits, size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}.get(mode, (bits, size))
    assert weight.dtype == torch.uint32
    assert weight.shape[-1] * 32 == bits * size * scales.shape[-1]
    if mode == "affine":
        assert bits in (2, 3, 4, 5, 6, 8)
        assert scales.dtype in FLOATS
        assert parts["biases"].shape == scales.shape
        assert parts["biases"].dtype == scales.dtype
        values = grouped(numbers(weight, bits, size * scales.shape[-1]).to(scales.dtype), scales)
        return values + parts["biases"].repeat_interleave(size, -1)
    assert scales.dtype == torch.uint8
    raw = weight.contiguous().view(torch.uint8)
    values = halves(raw) if bits == 4 else raw.view(torch.float8_e4m3fn).float()
    factor = scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else power(scales)
    assert mode in ("mxfp4", "mxfp8", "nvfp4")
    return grouped(values, factor).bfloat16()


def fp8(parts: Parts, settings: Settings) -> Tensor:
    """`weight_dequant` of DeepSeek-V3, `Fp8Dequantize` of transformers, ModelOpt's FP8: weight * scale in float32."""
    weight = parts["weight"]
    scales = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    assert weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    exponents = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
    assert exponents or scales.dtype in FLOATS
    block = settings.get("weight_block_size")
    return weight.float() * each(power(scales) if exponents else scales.float(), weight.shape, block)


def modelopt(parts: Parts, settings: Settings) -> Tensor:
    """`NVFP4QTensor.dequantize`, without a negative zero; of FP8 as `fp8`."""
    if parts["weight"].dtype != torch.uint8:
        return fp8(parts, settings)
    assert parts["weight_scale"].dtype == torch.float8_e4m3fn
    assert parts["weight_scale_2"].dtype == torch.float32
    factor = parts["weight_scale"].float() * parts["weight_scale_2"].reshape(())
    return grouped(halves(parts["weight"]) + 0.0, factor)


def mxfp4(parts: Parts, settings: Settings) -> Tensor:
    """`convert_moe_packed_tensors` of transformers: experts [count, rows, groups, 16 bytes], transposed."""
    blocks, scales = parts["_blocks"], parts["_scales"]
    assert scales.dtype == torch.uint8
    assert blocks.shape[:-1] == scales.shape
    exponents = (scales.int() - 127).unsqueeze(-1)
    values = torch.ldexp(halves(blocks).bfloat16(), exponents)
    return values.flatten(-2).transpose(1, 2)


def torchao(parts: Parts, settings: Settings) -> Tensor:
    """`dequantize` of Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor, whose attributes are the settings."""
    kind, said = settings["_type"], settings["_data"]
    numbers, scales = parts["_weight_qdata"], parts["_weight_scale"]
    assert said["dtype"]["_data"] in ("float32", "float16", "bfloat16")
    assert scales.dtype in FLOATS
    assert "_weight_act_pre_scale" not in parts
    dtype = getattr(torch, said["dtype"]["_data"])
    if kind == "Float8Tensor":
        assert numbers.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        return (numbers.float() * each(scales.float(), numbers.shape)).to(dtype)
    assert kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
    assert numbers.dtype == torch.int8
    rows, columns = said["block_size"]
    assert type(rows) is type(columns) is int
    values = numbers.to(dtype)
    over = lambda one: one.repeat_interleave(rows, 0).repeat_interleave(columns, 1)  # noqa: E731
    assert over(scales).shape == numbers.shape
    if "_weight_zero_point" in parts:
        zeros = parts["_weight_zero_point"]
        assert zeros.shape == scales.shape
        assert zeros.dtype in (torch.int8, *FLOATS)
        values = values - over(zeros).to(dtype)
    return (values * over(scales)).to(dtype)


def hqq(parts: Parts, settings: Settings) -> Tensor:
    """`Quantizer.dequantize`: the numbers of a word lie in it from its highest bits on, and far apart in the matrix."""
    text = {name: bytes(parts[name].tolist()).decode() for name in ("packing", "compute_dtype")}
    assert text["compute_dtype"] in ("torch.float32", "torch.float16", "torch.bfloat16")
    dtype, packing = getattr(torch, text["compute_dtype"].removeprefix("torch.")), text["packing"]
    bits, count, word = {
        "8bit_u8": (8, 1, torch.uint8), "4bit_u8": (4, 2, torch.uint8), "3bit_32": (3, 10, torch.int32),
        "2bit_u8": (2, 4, torch.uint8), "1bit_u8": (1, 8, torch.uint8),
    }[packing]  # fmt: skip
    shape = parts["shape"].tolist()
    assert len(shape) == 2
    assert parts["shape"].dtype == torch.int64
    assert min(shape) > 0
    assert parts["W_q"].dtype in (word, *FLOATS)
    assert parts["W_q"].ndim == 2
    words = parts["W_q"].contiguous().view(word).long()
    matrix = torch.cat([words >> bits * (count - 1 - place) & 2**bits - 1 for place in range(count)])
    rows, rest = divmod(prod(shape), matrix.shape[1])
    assert rest == 0
    assert 0 <= len(matrix) - rows < (10 if bits == 3 else 1)
    zeros, scales = parts["zero"], parts["scale"]
    assert zeros.shape == scales.shape
    assert zeros.dtype in FLOATS
    assert scales.dtype in FLOATS
    assert scales.numel() == 1 or scales.shape in ((rows, 1), (1, matrix.shape[1]))
    return ((matrix[:rows].to(dtype) - zeros.to(dtype)) * scales.to(dtype)).reshape(shape)


FORMATS: dict[str, Callable[[Parts, Settings], Tensor]] = {
    "gptq": gptq, "awq": awq, "bnb": bitsandbytes, "ct": compressed_tensors, "mlx": mlx, "modelopt": modelopt,
    "fp8": fp8, "mxfp4": mxfp4, "torchao": torchao, "hqq": hqq,
}  # fmt: skip
"""By the first word of a fixture's name."""
