"""Quantised checkpoints: the matrices that libraries packed, and tiny models made of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from support.texts import byte_tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "quantised"
NAMES = sorted(file.stem for file in FOLDER.glob("*.safetensors"))
MODULES = {
    "self_attn.q_proj": "square",
    "self_attn.k_proj": "square",
    "self_attn.v_proj": "square",
    "self_attn.o_proj": "square",
    "mlp.gate_proj": "up",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
"""The modules of a block, and which matrix each gets."""


class Fixture(NamedTuple):
    """What a library wrote: the parts by module, the words for config.json, its own result, and what the metadata of
    a shard say of a module.
    """

    parts: Mapping[str, Mapping[str, Tensor]]
    config: Mapping[str, Any]
    digests: Mapping[str, tuple[str, str]]
    library: str
    described: Mapping[str, str]


def fixture(name: str) -> Fixture:
    """What is in one of the files."""
    file = FOLDER / f"{name}.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        module, _, part = key.partition(".")
        parts.setdefault(module, {})[part] = tensor
    digests = {module: tuple(pair) for module, pair in json.loads(metadata["digests"]).items()}
    described = json.loads(metadata.get("described", "{}"))
    return Fixture(parts, json.loads(metadata["config"]), digests, metadata["library"], described)


def tiny_llama(blocks: int = 2) -> LlamaForCausalLM:
    """A Llama of width 64 with 128 channels, in bfloat16."""
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16()


def quantised_llama(name: str, folder: Path) -> Path:
    """A tiny Llama whose matrices are those that a library packed."""
    made = fixture(name)
    model = tiny_llama()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors, described = load_file(folder / "model.safetensors"), {}
    for block in range(2):
        for module, matrix in MODULES.items():
            prefix = f"model.layers.{block}.{module}"
            del tensors[f"{prefix}.weight"]
            tensors |= {f"{prefix}.{part}": t.clone() for part, t in made.parts[matrix].items()}
            if matrix in made.described:
                described[f"{prefix}.weight"] = made.described[matrix]
    write(folder, tensors, made.config, described)
    return folder


def fp8_llama(folder: Path, block: int = 16, **settings: object) -> Path:
    """A tiny Llama in block FP8: blocks of 16, or scales as DeepSeek has them."""
    folder.mkdir(exist_ok=True)
    model = tiny_llama()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name].float()
        rows, columns = (-(-size // block) for size in weight.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scales = padded.view(rows, block, columns, block).abs().amax((1, 3)) / 448
        each = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
        tensors[name] = (weight / each[: weight.shape[0], : weight.shape[1]]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    words = {"quant_method": "fp8", "weight_block_size": [block, block], **settings}
    write(folder, tensors, {"quantization_config": words})
    return folder


def gpt_oss_model() -> GptOssForCausalLM:
    """A tiny gpt-oss in bfloat16."""
    config = GptOssConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GptOssForCausalLM(config).bfloat16()


def gpt_oss(folder: Path) -> Path:
    """A tiny gpt-oss with experts in MXFP4."""
    gpt_oss_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, out, inputs // 32), dtype=torch.uint8)
    words = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write(folder, tensors, {"quantization_config": words})
    return folder


def write(
    folder: Path, tensors: dict[str, Tensor], words: Mapping[str, Any], described: Mapping[str, str] | None = None
) -> None:
    """Put other tensors into a folder, and words on quantisation into its config.json; the metadata of the file stay,
    and what is `described` is added.
    """
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    save_file(tensors, file, {**metadata, "format": "pt", **(described or {})})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **words}))


def dense_llama(matrices: Mapping[str, Tensor], folder: Path) -> Path:
    """The same Llama with plain matrices, by module of the fixture or by their whole names."""
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight").split(".", 3)[-1]
            if (key := name if name in matrices else MODULES.get(module, "")) in matrices:
                parameter.copy_(matrices[key])
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loads(folder: Path) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
