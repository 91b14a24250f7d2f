"""Quantised folders that somebody spoilt: what config.json says of them, and the parts of their packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.spoilt_json import NASTY, spoilt, spoilt_names

KEYS = ("quantization_config", "compression_config", "quantization")
METHODS = (
    "gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "modelopt_fp4", "fp8", "fbgemm_fp8", "mxfp8",
    "mxfp4", "nvfp4", "auto-round", "hqq", "quanto", "torchao", "eetq", "x", "", None, 1, ["gptq"], {"a": 1},
)  # fmt: skip
FOREIGN: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 5, 8, 16, 0, -4, "4", 4.0, None, True, [4]), "w_bit": (4, 3, "4"),
    "group_size": (-1, 0, 1, 16, 32, 64, 128, 10**9, "32", None, 0.5, True),
    "sym": (True, False, "x"), "desc_act": (True, False, 1), "checkpoint_format": ("gptq", "gptq_v2", "marlin", 7, ""),
    "packing_format": ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel", [], "x"),
    "format": ("pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "dense", "marlin-24", 5,
               "sparse-bitmask", "mixed-precision", "gptq_v2", [], {}),
    "version": ("gemm", "GEMM", "gemv", "exllama", 1, None), "is_marlin_format": (True, False, "x"),
    "weight_block_size": ([16, 16], [32, 32], [1, 32], [20, 20], [128, 128], [0, 0], [-16, 16], [16], "16", [1.5, 2],
                          [10**30, 1], [True, True], 16, None),
    "mode": ("affine", "mxfp4", "mxfp8", "nvfp4", "x", 3, None), "modules_to_not_convert": (["lm_head"], "x", [1], {}),
    "ignore": (["lm_head"], ["re:.*"], ["re:("], 3), "sparsity_config": ({"format": "sparse-bitmask"}, {}, "x", []),
    "kv_cache_scheme": ({"num_bits": 8}, "x"), "load_in_4bit": (True, False), "load_in_8bit": (True, "x"),
    "dynamic": ({"-:.*": {}}, {"+:(": {"bits": 8}}, 1), "quant_algo": ("FP8", "NVFP4", "W4A8", None, 4),
    "config_groups": ({}, [], {"group_0": {}}, {"group_0": []}, {"a": {"targets": ["re:("], "weights": {}}}, None, "x"),
    "quantization_status": ("frozen", "compressed", 1), "bnb_4bit_quant_type": ("fp4", "nf4", "x"),
    "activation_scheme": ("dynamic", "static"), "model.layers.0.mlp.up_proj": ({"bits": 8, "group_size": 64}, {}, True),
}  # fmt: skip


def spoil_settings(file: Path, draw: Random) -> str:
    """Change what a config.json says of quantisation; what was done."""
    config = json.loads(file.read_bytes())
    key = next((key for key in KEYS if key in config), "")
    if not key:
        return spoil_foreign(config, {}, file, draw)
    settings = config[key]
    what = draw.choice(["foreign", "foreign", "foreign", "method", "tree", "tree", "missing", "moved", "gone", "nasty"])
    if what == "foreign":
        return spoil_foreign(config, settings, file, draw)
    if what == "method":
        settings["quant_method"] = draw.choice(METHODS)
        what = f"method {settings['quant_method']!r}"
    elif what == "tree":
        changed, said = spoilt(json.dumps(settings).encode(), draw)
        try:
            config[key] = json.loads(changed)
        except (ValueError, RecursionError):
            config[key] = changed.decode(errors="replace")
        what = f"{key} {said}"
    elif what == "missing":
        gone = draw.choice(sorted(settings))
        del settings[gone]
        what = f"without {gone}"
    elif what == "moved":
        what = _moved(config, key, file.parent, draw)
    elif what == "gone":
        del config[key]
        what = f"without {key}"
    else:
        config[key] = draw.choice(NASTY)
        what = f"{key} = {config[key]!r:.60}"
    file.write_text(json.dumps(config))
    return f"config.json: {what[:200]}"


def spoil_foreign(config: dict[str, Any], settings: dict[str, Any], file: Path, draw: Random) -> str:
    """Set one or two settings, of this format or of another; what was done."""
    names = draw.sample(sorted(FOREIGN), draw.choice([1, 1, 2]))
    changes = {name: draw.choice(FOREIGN[name]) for name in names}
    groups = settings.get("config_groups")
    inner = groups["group_0"]["weights"] if isinstance(groups, dict) and "group_0" in groups else {}
    if inner and draw.random() < 0.7:
        name = draw.choice(sorted(inner))
        inner[name] = draw.choice(
            [1, 2, 3, 4, 5, 8, 16, -1, 0, 32, 64, "group", "channel", "int", "x", [16, 16], *NASTY]
        )
        changes = {f"config_groups.group_0.weights.{name}": inner[name]}
    else:
        settings |= changes
        if not settings.keys() - changes.keys():
            config["quantization_config"] = settings
    file.write_text(json.dumps(config))
    return f"config.json: {json.dumps(changes)[:160]}"


def _moved(config: dict[str, Any], key: str, folder: Path, draw: Random) -> str:
    """Put the settings elsewhere: under another key, into a part, into a file beside."""
    settings = config.pop(key)
    place = draw.choice([*KEYS, "text_config", "quantize_config.json", "quant_config.json", "hf_quant_config.json"])
    if place.endswith(".json"):
        nested = {"quantization": settings} if place.startswith("hf") and draw.random() < 0.7 else settings
        (folder / place).write_text(json.dumps(nested) if draw.random() < 0.8 else draw.choice(["", "[]", "{", "7"]))
    elif place == "text_config":
        config[place] = {"quantization_config": settings}
    else:
        config[place] = settings
    return f"{key} moved to {place}"


def spoil_parts(file: Path, draw: Random) -> str:
    """Change a part of a packed weight, or several; what was done."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    packed = sorted(name for name in tensors if "_proj" in name or "experts" in name)
    described = sorted(name for name in metadata if "." in name)
    if described and draw.random() < 0.4:
        return _spoil_description(file, tensors, metadata, draw.choice(described), draw)
    said = [_spoil_part(tensors, packed, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata)
    return "; ".join(said)


def _spoil_description(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str], name: str, draw: Random
) -> str:
    """Change what the metadata of a shard say of one tensor, as torchao writes it."""
    changed, said = spoilt(metadata[name].encode(), draw)
    metadata[draw.choice([name, name, name, "x", "lm_head.weight"])] = changed.decode(errors="replace")
    save_file(tensors, file, metadata)
    return f"description of {name} {said}"


ORPHANS = (
    "weight_scale", "scales", "qzeros", "g_idx", "weight_zero_point", "weight.absmax", "SCB", "input_scale",
    "weight_scale_inv", "weight_scale_2", "weight_shape", "biases", "_weight_qdata", "W_q", "zero",
)  # fmt: skip
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.uint32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool,
)  # fmt: skip


def _spoil_part(tensors: dict[str, Tensor], packed: list[str], draw: Random) -> str:
    name = draw.choice([name for name in packed if name in tensors] or sorted(tensors))
    what = draw.choice(
        ["value", "value", "value", "bytes", "bytes", "gone", "transposed", "cut", "cut", "longer", "cast", "viewed",
         "swapped", "swapped", "renamed", "reshaped", "empty", "both", "orphan", "state"]
    )  # fmt: skip
    tensor, last = tensors[name], name.rsplit(".", 1)[-1]
    if what == "value":
        what = _spoil_value(tensor, draw)
    elif what == "bytes":
        _spoil_bytes(tensor, draw)
    elif what == "gone":
        del tensors[name]
    elif what == "transposed" and tensor.ndim > 1:
        tensors[name] = tensor.transpose(-1, -2)
    elif what == "cut" and tensor.ndim:
        dimension = draw.randrange(tensor.ndim)
        tensors[name] = tensor.narrow(dimension, 0, draw.choice([0, 1, tensor.shape[dimension] // 2]))
    elif what == "longer" and tensor.ndim:
        tensors[name] = torch.cat([tensor, tensor[: draw.choice([1, len(tensor)])]])
    elif what == "cast":
        tensors[name] = tensor.to(torch.float32).to(draw.choice(DTYPES))
    elif what == "viewed" and tensor.ndim:
        dtype = draw.choice([dtype for dtype in DTYPES if dtype.itemsize <= tensor.itemsize])
        tensors[name] = tensor.contiguous().view(dtype)
    elif what == "swapped":
        same = [other for other in packed if other.rsplit(".", 1)[-1] == last and other in tensors]
        other = draw.choice(same if draw.random() < 0.7 else sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
        what = f"swapped with {other}:"
    elif what == "renamed":
        new = draw.choice([f"{name}s", f"{name}.weight", name.replace("weight", "qweight"), *spoilt_names(draw)])
        tensors[new] = tensors.pop(name)
    elif what == "reshaped":
        shapes = [(-1,), (1, *tensor.shape), (*tensor.shape, 1), (tensor.numel(), 1), (1, tensor.numel())]
        tensors[name] = tensor.reshape(draw.choice(shapes))
    elif what == "empty":
        tensors[name] = torch.empty(draw.choice([(0,), (0, 4), (4, 0), ()]), dtype=tensor.dtype)
    elif what == "both":
        module = name.removesuffix(f".{last}")
        tensors[f"{module}.weight"] = torch.ones(draw.choice([(64, 64), (128, 64)]), dtype=torch.bfloat16)
    elif what == "orphan":
        module = draw.choice(["model.norm", "lm_head", "model.embed_tokens", "x", name.removesuffix(f".{last}")])
        orphan = f"{module}.{draw.choice(ORPHANS)}"
        tensors[orphan] = tensor.clone()
        return f"orphan {orphan}"
    elif what == "state" and (states := [name for name in tensors if "quant_state" in name]):
        name = draw.choice(states)
        changed, said = spoilt(bytes(tensors[name].tolist()), draw)
        tensors[name] = torch.tensor(list(changed[:100_000]), dtype=torch.uint8)
        what = f"state {said[:100]}"
    return f"{what} {name[:80]} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _spoil_value(tensor: Tensor, draw: Random) -> str:
    """Set numbers of a tensor in place, all or one."""
    value = draw.choice([float("nan"), float("inf"), -1.0, 0.0, 1e30, 1e-30, 65504.0, 7.0, 255.0])
    whole = not tensor.dtype.is_floating_point
    number = torch.tensor(value).nan_to_num(127, 127, 0).clamp(-(2**31), 2**31 - 1) if whole else torch.tensor(value)
    if tensor.ndim and tensor.numel() and draw.random() < 0.6:
        place = draw.randrange(tensor.numel())
        flat = tensor.flatten().float() if tensor.itemsize < 4 else tensor.flatten().double()
        flat[place] = number
        tensor.copy_(flat.view(tensor.shape).to(tensor.dtype))
        return f"{value} at {place} of"
    tensor.copy_(number.double().expand(tensor.shape).to(tensor.dtype))
    return f"all {value} in"


def _spoil_bytes(tensor: Tensor, draw: Random) -> None:
    """Set bytes of a tensor in place."""
    raw = tensor.view(torch.uint8) if tensor.ndim else tensor.view(1).view(torch.uint8)
    flat = raw.view(-1)
    for _ in range(draw.choice([1, 4, 50]) if len(flat) else 0):
        flat[draw.randrange(len(flat))] = draw.choice([draw.randrange(256), 0, 0x80, 0xFF, 0x7F])
