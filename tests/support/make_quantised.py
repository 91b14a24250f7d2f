"""Make the packed matrices in `tests/fixtures/quantised`, each by the library of its format.

A file holds the parts of one or more matrices under the names of their modules and, in its metadata,
how config.json describes them, which library wrote them, and for every matrix the SHA-256 of the
bytes that the same library decodes it to, with their dtype. What a library writes into the metadata
of a shard stands under "described". Made in an environment of its own, all or those that are named:

    pip install compressed-tensors gptqmodel autoawq bitsandbytes nvidia-modelopt 'mlx[cpu]' torchao hqq
    python tests/support/make_quantised.py tests/fixtures/quantised torchao-int8 hqq-4
"""

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {"square": (64, 64), "up": (128, 64), "down": (64, 128)}
"""The matrices of a Llama of width 64 with 128 channels."""
GROUP = 32
Made = tuple[dict[str, Tensor], Tensor] | tuple[dict[str, Tensor], Tensor, str]
"""The parts of a matrix by their names in its module, and what the library decodes them to; also
what the metadata of the shard say of it.
"""


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """The matrices that are packed, drawn anew; a few columns are large, a few zero."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=draw) * 0.05
        weight[:, 3] *= 8
        weight[:, 7] = 0
        made[name] = weight.to(dtype)
    return made


def grouped(weight: Tensor, size: int = GROUP) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group [out, groups], zero among them."""
    groups = weight.float().unflatten(-1, (-1, size))
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def compressed_tensors(form: str, arguments: dict[str, Any], weight: Tensor) -> Made:
    """A matrix in a format of compressed-tensors."""
    quantization = import_module("compressed_tensors.quantization")
    utils = import_module("compressed_tensors.quantization.utils")
    registry = import_module("compressed_tensors.compressors").BaseCompressor
    args = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    whole: dict[str, Any] = {}
    if args.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif args.group_size:
        groups = weight.unflatten(-1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    if form.startswith("nvfp4"):
        whole["global_scale"] = utils.generate_gparam(weight.amin(), weight.amax())
    scale, zero = utils.calculate_qparams(low, high, args, **whole)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    state |= {f"weight_{name}": value for name, value in whole.items()}
    compressor = registry.get_value_from_registry(form)
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(dict(packed), scheme)["weight"]


def gptq(bits: int, settings: dict[str, Any], weight: Tensor) -> Made:
    """A matrix in GPTQ's packing, its inputs in another order where the settings say so."""
    layer = import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    out, inputs = weight.shape
    order = torch.arange(inputs)
    if settings["desc_act"]:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    low, high = grouped(weight[:, order])
    scale = (high - low) / (2**bits - 1) * 1.01
    zero = torch.round(-low / scale)
    if settings["sym"]:
        scale = torch.maximum(high, -low) / 2 ** (bits - 1) * 1.2
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    index = torch.empty(inputs, dtype=torch.int32)
    index[order] = torch.arange(inputs, dtype=torch.int32) // GROUP
    linear = torch.nn.Linear(inputs, out, bias=False).half()
    linear.weight.data = weight
    made = layer(bits, GROUP, settings["sym"], settings["desc_act"], inputs, out, bias=False)
    made.pack(linear, scale, zero, index)
    dense = made.eval().dequantize_weight().T.contiguous()
    if settings["checkpoint_format"] == "gptq":
        convert = import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
        config = import_module("gptqmodel.quantization.config").QuantizeConfig(bits=bits)
        convert(made, quantize_config=config)
    parts = {name: getattr(made, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    return parts, dense


def awq(weight: Tensor) -> Made:
    """A matrix in AWQ's gemm packing."""
    layer = import_module("awq.modules.linear.gemm").WQLinear_GEMM
    decode = import_module("awq.utils.packing_utils").dequantize_gemm
    low, high = grouped(weight)
    scale = ((high - low) / 15 * 1.02).half()
    zero = torch.round(-low / scale)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
    linear.weight.data = weight
    scales, zeros = scale.T.contiguous(), zero.T.contiguous().half()
    made = layer.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
    parts = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales")}
    return parts, decode(made.qweight, made.qzeros, made.scales, 4, GROUP).T


def four_bits(kind: str, nested: bool, weight: Tensor) -> Made:
    """A matrix in NF4 or FP4."""
    functional = import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **parts}, functional.dequantize_4bit(packed, state)


def eight_bits(weight: Tensor) -> Made:
    """A matrix of LLM.int8."""
    functional = import_module("bitsandbytes.functional")
    numbers, largest, _ = functional.int8_vectorwise_quant(weight)
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(numbers, largest)


def nvfp4(weight: Tensor) -> Made:
    """A matrix in ModelOpt's NVFP4."""
    kind = import_module("modelopt.torch.quantization.qtensor").NVFP4QTensor
    packed, scale, whole = kind.quantize(weight, 16)
    sizes = {-1: 16}
    dense = packed.dequantize(scale=scale, double_scale=whole, block_sizes=sizes, dtype=torch.float32)
    parts = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": whole}
    return {**parts, "input_scale": torch.tensor(0.5)}, dense


def fp8(weight: Tensor) -> Made:
    """A matrix in ModelOpt's FP8, with one scale."""
    kind = import_module("modelopt.torch.quantization.qtensor").FP8QTensor
    packed, scale = kind.quantize(weight)
    dense = packed.dequantize(scale=scale, dtype=torch.float32)
    return {"weight": packed._quantized_data, "weight_scale": scale.float()}, dense


def torchao(config: str, settings: Callable[[Any], dict[str, Any]], weight: Tensor) -> Made:
    """A matrix in a class of torchao, taken apart as transformers saves it."""
    quantization = import_module("torchao.quantization")
    apart = import_module("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight.data = weight
    quantization.quantize_(module, getattr(quantization, config)(**settings(quantization)))
    parts, metadata = apart({"m.weight": module.weight})
    dense: Any = module.weight
    parts = {name.removeprefix("m."): part for name, part in parts.items()}
    return parts, dense.dequantize(), metadata["m.weight"]


def hqq(settings: dict[str, Any], weight: Tensor) -> Made:
    """A matrix of HQQ, as its layer writes it for safetensors."""
    core = import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(**settings)
    layer = core.HQQLinear.from_weights(weight, None, config, compute_dtype=weight.dtype, device="cpu")
    return layer.state_dict(), layer.dequantize()


def mlx(arguments: dict[str, Any], weight: Tensor) -> Made:
    """A matrix of MLX."""
    core = import_module("mlx.core")
    array = core.array(weight.float().numpy()).astype(core.bfloat16)
    packed = core.quantize(array, **arguments)
    dense = core.dequantize(*packed, **arguments, dtype=core.bfloat16)
    names = ("weight", "scales", "biases")
    return dict(zip(names, map(_to_torch, packed), strict=False)), _to_torch(dense)


def _to_torch(array: Any) -> Tensor:
    """The same bytes as a tensor."""
    core = import_module("mlx.core")
    kinds = {core.bfloat16: torch.bfloat16, core.uint32: torch.uint32, core.uint8: torch.uint8}
    raw = bytearray(bytes(memoryview(core.view(array, core.uint8))))
    return torch.frombuffer(raw, dtype=kinds[array.dtype]).reshape(array.shape)


def _compressed(form: str, **arguments: Any) -> tuple[Any, ...]:
    """What is made in a format of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": arguments, "format": form}
    settings = {"quant_method": "compressed-tensors", "format": form}
    settings |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    making: Callable[[Tensor], Made] = lambda w: compressed_tensors(form, arguments, w)  # noqa: E731
    return "compressed-tensors", {"quantization_config": settings}, torch.bfloat16, making


def _gptq(bits: int, *, sym: bool, order: bool, form: str = "gptq") -> tuple[Any, ...]:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym}
    settings |= {"desc_act": order, "checkpoint_format": form}
    making: Callable[[Tensor], Made] = lambda w: gptq(bits, settings, w)  # noqa: E731
    return "gptqmodel", {"quantization_config": settings}, torch.float16, making


def _mlx(bits: int, group: int, mode: str = "affine") -> tuple[Any, ...]:
    arguments = {"group_size": group, "bits": bits, "mode": mode}
    making: Callable[[Tensor], Made] = lambda w: mlx(arguments, w)  # noqa: E731
    return "mlx", {"quantization": arguments}, torch.bfloat16, making


def _bitsandbytes(dtype: torch.dtype, making: Callable[[Tensor], Made]) -> tuple[Any, ...]:
    settings = {"quant_method": "bitsandbytes"}
    return "bitsandbytes", {"quantization_config": settings}, dtype, making


def _torchao(config: str, settings: Callable[[Any], dict[str, Any]], dtype: torch.dtype) -> tuple[Any, ...]:
    """What is made in a class of torchao; `settings` get its module, which may not be there."""
    making: Callable[[Tensor], Made] = lambda w: torchao(config, settings, w)  # noqa: E731
    return "torchao", {"quantization_config": {"quant_method": "torchao"}}, dtype, making


def _hqq(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[Any, ...]:
    making: Callable[[Tensor], Made] = lambda w: hqq(settings, w)  # noqa: E731
    config = {"quant_config": {"weight_quant_params": settings}, "quant_method": "hqq"}
    return "hqq", {"quantization_config": config}, dtype, making


def _modelopt(kind: str, making: Callable[[Tensor], Made]) -> tuple[Any, ...]:
    settings = {"quant_method": "modelopt", "quant_algo": kind}
    return "nvidia-modelopt", {"quantization_config": settings}, torch.bfloat16, making


INT4_OF_TORCH: Any = getattr(torch, "int4", None)  # which its stubs do not know
INT3_OF_TORCH: Any = getattr(torch, "int3", None)
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
BLOCK = {"strategy": "block", "block_structure": [32, 32]}
MADE = {
    "ct-int4": _compressed("pack-quantized", **INT4, symmetric=True),
    "ct-int4-zeros": _compressed("pack-quantized", **INT4, symmetric=False),
    "ct-int3-zeros": _compressed("pack-quantized", **{**INT4, "num_bits": 3}, symmetric=False),
    "ct-int8-packed": _compressed("pack-quantized", **INT8, symmetric=True),
    "ct-int8": _compressed("int-quantized", **INT8, symmetric=False),
    "ct-fp8-channel": _compressed("float-quantized", **FLOAT8, strategy="channel"),
    "ct-fp8-tensor": _compressed("float-quantized", **FLOAT8, strategy="tensor"),
    "ct-fp8-block": _compressed("naive-quantized", **FLOAT8, **BLOCK),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group", group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
    "ct-mxfp4": _compressed(
        "mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "ct-mxfp8": _compressed(
        "mxfp8-quantized", **FLOAT8, strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "gptq-2": _gptq(2, sym=False, order=False),
    "gptq-3": _gptq(3, sym=False, order=True),
    "gptq-4": _gptq(4, sym=True, order=False),
    "gptq-4-order": _gptq(4, sym=False, order=True),
    "gptq-4-v2": _gptq(4, sym=False, order=True, form="gptq_v2"),
    "gptq-8": _gptq(8, sym=True, order=False),
    "awq": (
        "autoawq",
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP,
                                 "version": "gemm", "zero_point": True}},
        torch.float16,
        awq,
    ),
    "bnb-nf4": _bitsandbytes(torch.bfloat16, lambda w: four_bits("nf4", False, w)),
    "bnb-nf4-nested": _bitsandbytes(torch.bfloat16, lambda w: four_bits("nf4", True, w)),
    "bnb-fp4": _bitsandbytes(torch.float16, lambda w: four_bits("fp4", False, w)),
    "bnb-int8": _bitsandbytes(torch.float16, eight_bits),
    "modelopt-nvfp4": _modelopt("NVFP4", nvfp4),
    "modelopt-fp8": _modelopt("FP8", fp8),
    "torchao-int8": _torchao("Int8WeightOnlyConfig", lambda _: {}, torch.bfloat16),
    "torchao-int4": _torchao(
        "IntxWeightOnlyConfig",
        lambda q: {"weight_dtype": INT4_OF_TORCH, "granularity": q.PerGroup(32),
                   "mapping_type": q.MappingType.ASYMMETRIC},
        torch.bfloat16,
    ),
    "torchao-int3": _torchao(
        "IntxWeightOnlyConfig",
        lambda q: {"weight_dtype": INT3_OF_TORCH, "granularity": q.PerAxis(0)},
        torch.float16,
    ),
    "torchao-float8": _torchao("Float8WeightOnlyConfig", lambda _: {}, torch.bfloat16),
    "hqq-1": _hqq(nbits=1, group_size=32, axis=1),
    "hqq-2": _hqq(torch.float16, nbits=2, group_size=16, axis=0),
    "hqq-3": _hqq(torch.float16, nbits=3, group_size=64, axis=0),
    "hqq-3-rows": _hqq(nbits=3, group_size=64, axis=1),
    "hqq-4": _hqq(nbits=4, group_size=64, axis=1),
    "hqq-4-float": _hqq(nbits=4, group_size=64, axis=1, view_as_float=True),
    "hqq-8": _hqq(torch.float32, nbits=8, group_size=64, axis=1),
    **{f"mlx-{bits}": _mlx(bits, 64 if bits != 6 else 32) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx-mxfp4": _mlx(4, 32, "mxfp4"),
    "mlx-mxfp8": _mlx(8, 32, "mxfp8"),
    "mlx-nvfp4": _mlx(4, 16, "nvfp4"),
}  # fmt: skip
"""By the name of a file: library, config.json, dtype of the weights, and what packs one."""


def digest(dense: Tensor) -> list[str]:
    """The dtype of a tensor and the SHA-256 of its bytes."""
    raw = dense.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [str(dense.dtype).removeprefix("torch."), sha256(raw).hexdigest()]


def main(folder: Path, names: list[str]) -> None:
    for name, (library, config, dtype, making) in MADE.items():
        if names and name not in names:
            continue
        tensors: dict[str, Tensor] = {}
        digests, described = {}, {}
        matrices = weights(dtype)
        for module, weight in matrices.items():
            parts, dense, *said = making(weight.clone())
            tensors |= {f"{module}.{part}": t.detach().contiguous() for part, t in parts.items()}
            digests[module] = digest(dense)
            if said:
                described[module] = said[0]
        metadata = {"library": f"{library} {version(library)}", "config": json.dumps(config)}
        metadata |= {"digests": json.dumps(digests)}
        metadata |= {"described": json.dumps(described)} if described else {}
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        print(name, metadata["library"], sum(t.nbytes for t in tensors.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
