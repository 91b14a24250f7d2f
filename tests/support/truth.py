"""What the tensors of a source are by the descriptions of its format, and what a result has otherwise.

Nothing of the package is used: plain shards are read by safetensors, packed weights decoded by `reference.formats`,
GGUF taken apart by `spoilt_gguf` and dequantised by the `gguf` package.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference.formats import FORMATS
from safetensors import safe_open
from torch import Tensor

from support.quantised import gpt_oss_model, tiny_llama
from support.spoilt_gguf import Gguf, parse

SOURCES = "quantised-"
"""How the names of sound folders begin that are quantised: then comes the format, "gptq-4"."""
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx", "weight"), "awq": ("qweight", "qzeros", "scales", "weight"),
    "bnb": ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
            "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    "ct": ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
           "weight_global_scale"),
    "mlx": ("weight", "scales", "biases"), "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"), "mxfp4": ("_blocks", "_scales"),
    "torchao": ("weight", "_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_pre_scale"),
    "hqq": ("weight", "W_q", "scale", "zero", "shape", "packing", "compute_dtype"),
}  # fmt: skip
MAIN = {
    "gptq": {"qweight"}, "awq": {"qweight"}, "bnb": {"SCB", "weight.absmax"}, "ct": {"weight_packed", "weight_scale"},
    "mlx": {"scales"}, "modelopt": {"weight_scale", "weight_scale_2"}, "fp8": {"weight_scale_inv", "weight_scale"},
    "mxfp4": {"_blocks"}, "torchao": {"_weight_qdata"}, "hqq": {"W_q"},
}  # fmt: skip
"""Parts beside which no weight is plain."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Stored = Mapping[str, Tensor]


def truth(model: Path, base: str) -> dict[str, Tensor]:
    """The tensors of a source, of a quantised one those that its plain model has, as they are decoded.

    Raises what it meets where the source is not what its format says.
    """
    kind = base.removeprefix(SOURCES).split("-")[0]
    if not base.startswith(SOURCES):
        return stored_tensors(model)
    if kind == "gguf":
        return dict(_gguf(parse((model / "model.gguf").read_bytes())))
    stored, settings = stored_tensors(model), _settings(model)
    said = _described(model) if kind == "torchao" else {}
    return {
        name: tensor
        for name in _names(kind)
        for tensor in _decoded(stored, {**settings, **said.get(name, {})}, kind, name)
    }


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor as transformers would choose it: of the one file, else of the shards in the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = None if single.is_file() else json.loads(index.read_bytes())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in [single] if names is None else sorted({folder / shard for shard in names.values()}):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _described(folder: Path) -> dict[str, Any]:
    """By the name of a weight, what the metadata of the shards say of it."""
    said: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        said |= {name: json.loads(text) for name, text in metadata.items() if "." in name}
    return said


@lru_cache
def _names(kind: str) -> tuple[str, ...]:
    return tuple((gpt_oss_model() if kind == "mxfp4" else tiny_llama()).state_dict())


def _settings(folder: Path) -> Mapping[str, Any]:
    """What config.json says of the packed weights; of compressed-tensors its one group."""
    config = json.loads((folder / "config.json").read_bytes())
    places = (config, config.get("text_config"))
    keys = ("quantization_config", "compression_config", "quantization")
    found = [place[key] for place in places if isinstance(place, dict) for key in keys if place.get(key)]
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (folder / name).is_file():
            found.append(json.loads((folder / name).read_bytes()))
    settings = found[0] if found and isinstance(found[0], dict) else {}
    groups = settings.get("config_groups")
    inner = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in inner if isinstance(group, dict)]
    return next((one for one in weights if isinstance(one, dict)), settings)


def _decoded(stored: Stored, settings: Mapping[str, Any], kind: str, name: str) -> Iterator[Tensor]:
    """The tensor of a name of the plain model; nothing where the source has none."""
    module = name if kind == "mxfp4" else name.removesuffix("weight")
    parts = {part: stored[module + part] for part in PARTS[kind] if module + part in stored}
    packed = stored[name].dtype not in PLAIN if name in stored else bool(parts)
    if (packed and "_proj" in name) or parts.keys() & MAIN[kind]:
        yield FORMATS[kind](parts, settings)
    elif name in stored:
        yield stored[name]


LLAMA = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _gguf(file: Gguf) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a GGUF file. llama.cpp wants them one behind the other, and so does this."""
    package, end = import_module("gguf"), 0
    architecture = file.get("general.architecture").decode()
    heads = file.get(f"{architecture}.attention.head_count")
    few = file.get(f"{architecture}.attention.head_count_kv", heads)
    for info in file.tensors:
        assert info.offset == end
        end += -(-info.size // 32) * 32
        dtypes = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32, 28: np.float64}
        raw = np.frombuffer(file.held(info), dtypes.get(info.kind, np.uint8))
        kind = package.GGMLQuantizationType(info.kind)
        with np.errstate(all="ignore"):
            rows = raw.reshape(*info.dims[:0:-1], -1)
            weight = torch.from_numpy(np.array(package.dequantize(rows, kind))).view(*reversed(info.dims))
        name = info.name.decode().removesuffix(".weight")
        if name in ENDS:
            yield f"{ENDS[name]}.weight", weight
            continue
        _, block, part = name.split(".")
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            weight = _halves(weight, heads if part == "attn_q" else few)
        yield f"model.layers.{block}.{LLAMA[part]}.weight", weight


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of query or key in pairs, as rows of a first and of a second half of each head."""
    size = len(weight) // heads
    order = [head * size + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(size // 2)]
    return weight[order]


SETTINGS = {
    "embedding_length": ("hidden_size", None), "block_count": ("num_hidden_layers", None),
    "feed_forward_length": ("intermediate_size", None), "context_length": ("max_position_embeddings", None),
    "attention.head_count": ("num_attention_heads", None), "rope.freq_base": ("rope_theta", 10000.0),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", None),
}  # fmt: skip
"""What a configuration has for a setting of GGUF, and what llama.cpp takes where it is missing; else it refuses."""


def other_settings(model: Path, config: Mapping[str, Any]) -> str:
    """Where a configuration says something else than the GGUF file; empty where nowhere."""
    file = parse((model / "model.gguf").read_bytes())
    architecture = file.get("general.architecture").decode()
    config = {**config, **(config.get("rope_parameters") or {})}
    for key, (name, otherwise) in SETTINGS.items():
        wanted = file.get(f"{architecture}.{key}", otherwise)
        if wanted is None or config.get(name) is None or abs(config[name] - wanted) > 1e-6 * abs(wanted):
            return f"{name} is {config.get(name)}, and {key} is {wanted}"
    heads = file.get(f"{architecture}.attention.head_count")
    few = file.get(f"{architecture}.attention.head_count_kv", heads)
    if config.get("num_key_value_heads") != few:
        return f"num_key_value_heads is {config.get('num_key_value_heads')}, and head_count_kv is {few}"
    return ""


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes; every NaN is one."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype in PLAIN:
        return torch.equal(one.nan_to_num(3.0), other.nan_to_num(3.0)) and torch.equal(one.isnan(), other.isnan())
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def other_tensors(wanted: Stored, found: Stored, *, cast: bool, pruned: Container[str] = ()) -> str:
    """Which tensor a result lacks, or has otherwise than its source, but for zeros in what was pruned; empty for none.

    `cast`: the result is in bfloat16, but for vectors in float32.
    """
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name} is missing"
        kept = found[name]
        if not cast and kept.dtype in PLAIN and tensor.dtype in PLAIN:
            kept = kept.to(tensor.dtype)  # another format may hold the same numbers in more bits
        if cast:
            vector = tensor.ndim < 2 and tensor.dtype == torch.float32
            tensor = tensor.to(torch.float32 if vector else torch.bfloat16 if tensor.dtype in PLAIN else tensor.dtype)
        if name in pruned and kept.shape == tensor.shape:
            tensor = torch.where(kept == 0, kept, tensor)
        if not same(kept, tensor):
            return f"{name} is {kept.dtype}{list(kept.shape)}, and {tensor.dtype}{list(tensor.shape)} by its source"
    return ""
