"""Each of llama.cpp's architectures that is read: a file is written here as llama.cpp's converter writes it, tensor by
tensor, and what is read of it must be the model that it was, in its tensors and in its logits.

Written down from the converter (its renaming, its orders of rows, its norms with one added), not from what reads it.
What `FILES` holds was compared with the real converter and with the logits of llama.cpp itself (docs/LOG.md).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import tiny_config
from transformers import AutoModelForCausalLM

from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised.gguf import gguf_source
from secateur.checkpoints.quantised.gguf_architectures import ARCHITECTURES
from secateur.checkpoints.quantised.gguf_settings import Contents, gguf_config
from secateur.checkpoints.quantised.unpack import write_plain
from secateur.errors import UnsupportedModel
from secateur.system.progress import Progress

package = pytest.importorskip("gguf", reason="the package gguf is not installed")
Settings = dict[str, Any]

ALL = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
LONG = {"context_length": "max_position_embeddings"}
WIDE = {"feed_forward_length": "intermediate_size"}
KV = {"attention.head_count_kv": "num_key_value_heads"}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
HEAD = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
USUAL = {**LONG, **WIDE, **KV, **RMS}
GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
SCALES = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
THETA = 12345.0
SSM = {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip
QWEN35 = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 1, 1], "mrope_interleaved": True},
}  # fmt: skip
QWEN35_SET = {
    "full_attention_interval": 2, "ssm.inner_size": 6 * 16, "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
}  # fmt: skip
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]

FILES: dict[str, tuple[str, Settings, dict[str, str], Settings]] = {
    "arcee": ("arcee", {}, {**USUAL, **HEAD}, {}),
    "bloom": ("bloom", {}, {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, {"context_length": 64}),
    "cohere": ("command-r", {"logit_scale": 0.5}, {**LONG, **WIDE, **KV, "logit_scale": "logit_scale"},
               {"attention.layer_norm_epsilon": 1e-4}),
    "cohere2": ("cohere2", {"layer_types": SLIDING}, {
        **LONG, **WIDE, **KV, **HEAD, **WINDOW, "logit_scale": "logit_scale"},
                {"attention.layer_norm_epsilon": 1e-4}),
    "exaone4": ("exaone4", {}, {**USUAL, **WINDOW}, {"attention.sliding_window_pattern": [True, False] * 2}),
    "gemma": ("gemma", {"head_dim": 24}, {**USUAL, **HEAD}, {}),
    "gemma2": ("gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0},
               {**USUAL, **HEAD, **WINDOW, "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping"}, {}),
    "gemma3_text": ("gemma3", {"layer_types": SLIDING, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}}, {**USUAL, **HEAD, **WINDOW},
        {"rope.freq_base_swa": 77.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
         "attention.sliding_window_pattern": 4}),
    "glm4": ("glm4", {}, {**USUAL, **HEAD}, {"rope.dimension_count": 8}),
    "gpt2": ("gpt2", {}, {**LONG, "attention.layer_norm_epsilon": "layer_norm_epsilon"}, {"feed_forward_length": 128}),
    "gpt_oss": ("gpt-oss", {}, {
        **USUAL, **HEAD, **WINDOW, **EXPERTS, "expert_feed_forward_length": "intermediate_size"},
                {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
                 "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}),
    "granite": ("granite", SCALES, {**USUAL, **GRANITE}, {}),
    "granitemoe": ("granitemoe", SCALES, {**USUAL, **GRANITE, **EXPERTS, "expert_count": "num_local_experts"}, {}),
    "lfm2": ("lfm2", {"intermediate_size": 256, "block_auto_adjust_ff_dim": False},
             {**LONG, **WIDE, "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
             {"attention.head_count_kv": [0, 2, 0, 2]}),
    "mixtral": ("llama", {"sliding_window": None}, {**USUAL, **EXPERTS}, {"rope.dimension_count": 16}),
    "nemotron": ("nemotron", {}, {**LONG, **WIDE, **KV, **HEAD, "attention.layer_norm_epsilon": "norm_eps"},
                 {"rope.dimension_count": 8}),
    "olmo": ("olmo", {"clip_qkv": 0.4}, {**LONG, **WIDE, **KV, "attention.clamp_kqv": "clip_qkv"},
             {"attention.layer_norm_epsilon": 1e-5}),
    "olmo2": ("olmo2", {}, USUAL, {}),
    "olmoe": ("olmoe", {}, {**USUAL, **EXPERTS}, {}),
    "phi": ("phi2", {"num_key_value_heads": 4}, {
        **LONG, **WIDE, **KV, "attention.layer_norm_epsilon": "layer_norm_eps"},
            {"rope.dimension_count": 8}),
    "phi3": ("phi3", {}, {**USUAL, **WINDOW}, {"rope.dimension_count": 16}),
    "qwen2_moe": ("qwen2moe", {"sliding_window": None}, {
        **USUAL, **EXPERTS, "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}, {}),
    "qwen3_5_text": ("qwen35", QWEN35, {**USUAL, **HEAD, **SSM}, QWEN35_SET),
    "qwen3_5_moe_text": ("qwen35moe", QWEN35, {
        **LONG, **KV, **RMS, **HEAD, **SSM, **EXPERTS, "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}, QWEN35_SET),
    "seed_oss": ("seed_oss", {}, {**USUAL, **HEAD}, {}),
    "smollm3": ("smollm3", {"sliding_window": None}, USUAL, {"rope.dimension_count": 16, "vocab_size": 128}),
    "stablelm": ("stablelm", {}, {**LONG, **WIDE, **KV, "attention.layer_norm_epsilon": "layer_norm_eps"},
                 {"rope.dimension_count": 4, "use_parallel_residual": False}),
    "starcoder2": ("starcoder2", {"sliding_window": None},
                   {**LONG, **WIDE, **KV, "attention.layer_norm_epsilon": "norm_epsilon"}, {}),
}  # fmt: skip
"""By family: llama.cpp's name, what its configuration has otherwise, settings by their names there, others."""
ELSEWHERE = {"llama", "qwen2", "qwen3", "qwen3moe"}
"""Architectures under test in test_gguf_source.py."""
TURNED = {"arcee", "granite", "granitemoe", "llama", "olmo", "smollm3"}
ONE_MORE = {"gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe"}


def pairs(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + half of each head beside one another."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def tiled(value: np.ndarray, config: Any, each: int) -> np.ndarray:
    """Value heads: the first of each key's, then the second of each."""
    keys = config.linear_num_key_heads
    return value.reshape(keys, -1, each, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def linear_attention(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """A weight of Qwen3.5's linear attention as llama.cpp has it."""
    kind, each = name.split("linear_attn.")[1].removesuffix(".weight"), config.linear_value_head_dim
    if kind == "A_log":
        return tiled(-np.exp(value), config, 1)
    if kind in ("dt_bias", "in_proj_a", "in_proj_b"):
        return tiled(value, config, 1)
    if kind == "in_proj_z":
        return tiled(value, config, each)
    if kind == "out_proj":
        return tiled(value.T, config, each).T
    if kind in ("in_proj_qkv", "conv1d"):
        value = value.squeeze()
        front = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return np.concatenate([value[:front], tiled(value[front:], config, each)])
    return value


def converted(name: str, value: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    """A tensor as llama.cpp's converter stores it."""
    if ".linear_attn." in name and not name.endswith("linear_attn.norm.weight"):
        return linear_attention(name, value, config)
    if architecture in TURNED and "q_proj" in name:
        return pairs(value, config.num_attention_heads)
    if architecture in TURNED and "k_proj" in name:
        return pairs(value, config.num_key_value_heads)
    if architecture in ONE_MORE and name.endswith("norm.weight") and "linear_attn" not in name:
        return value + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return value.T
    if architecture == "bloom" and "query_key_value" in name:
        of_heads = value.reshape(config.n_head, 3, -1, *value.shape[1:])
        return np.concatenate([of_heads[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])
    return value.squeeze(1) if name.endswith("conv.conv.weight") else value


def of_experts(block: str, name: str, value: np.ndarray, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """The experts of a block as llama.cpp has them: gate, up and down apart, inputs last."""
    kind = "bias" if name.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and kind == "weight":
        value = value.transpose(0, 2, 1)
    if "gate_up" not in name:
        yield f"blk.{block}.ffn_down_exps.{kind}", value
        return
    half = value.shape[1] // 2
    gate, up = (value[:, 0::2], value[:, 1::2]) if architecture == "gpt-oss" else (value[:, :half], value[:, half:])
    yield f"blk.{block}.ffn_gate_exps.{kind}", gate
    yield f"blk.{block}.ffn_up_exps.{kind}", up


SPECIAL = {
    "self_attn.sinks": "attn_sinks.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "router.weight": "ffn_gate_inp.weight",
}


def stored(model: Any, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    arch = next(arch for arch, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
    table = package.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        parts, value = name.split("."), tensor.numpy()
        block = next((part for part in parts if part.isdigit()), "")
        if ".experts." in name:
            yield from of_experts(block, name, value, architecture)
            continue
        special = next((leaf for end, leaf in SPECIAL.items() if name.endswith(end)), None)
        called = f"blk.{block}.{special}" if special else None
        for known in (name, name.partition(".")[2]):
            called = called or table.get_name(known, try_suffixes=(".weight", ".bias"))
        assert called, name
        yield called, np.ascontiguousarray(converted(name, value, architecture, model.config))


def add(writer: Any, key: str, value: Any) -> None:
    """A setting of any kind."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def write(
    model: Any, file: Path, architecture: str, settings: Settings, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    writer = package.GGUFWriter(file, architecture)
    for key, value in settings.items():
        add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["t", "u", "tu", *(f"x{number}" for number in range(3, model.config.vocab_size))])
    writer.add_token_types([1] * model.config.vocab_size)
    writer.add_token_merges(["t u"])
    for name, value in [*stored(model, architecture), *(tensors or {}).items()]:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def made(family: str, other: Settings) -> Any:
    """A tiny model of a family with the base of its rotation, and noise in every parameter."""
    config: Any = tiny_config(family)
    if "rope_theta" in (getattr(config, "rope_parameters", None) or {}):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": THETA}
    config = type(config).from_dict({**config.to_dict(), **other})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def settings_of(model: Any, named: dict[str, str], others: Settings) -> Settings:
    config = model.config
    settings = {key: getattr(config, name) for key, name in {**ALL, **named}.items()}
    turned = bool(getattr(config, "rope_parameters", None))
    return settings | ({"rope.freq_base": THETA} if turned else {}) | others


def test_every_architecture_is_under_test():
    assert {architecture for architecture, *_ in FILES.values()} | ELSEWHERE == ARCHITECTURES.keys()


@pytest.mark.parametrize("family", FILES)
def test_what_was_converted_is_read_again(family, tmp_path):
    architecture, other, named, others = FILES[family]
    model = made(family, {"layer_norm_eps": 1e-4} | other if family.startswith("cohere") else other)
    file = write(model, tmp_path / "model.gguf", architecture, settings_of(model, named, others))
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "plain").mkdir()
    write_plain(gguf_source(file), tmp_path / "plain", "float32", Progress())
    before, after = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "plain")
    assert after.shapes == before.shapes
    for name in before.places:  # w + 1 − 1 in float32 is w to 2⁻²⁴
        rounded = architecture in ONE_MORE and name.endswith(("norm.weight", "A_log"))
        bound = 1.2e-7 if rounded else 0.0
        torch.testing.assert_close(after.tensor(name), before.tensor(name), rtol=0, atol=bound, msg=name)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(again) is type(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )


def config_of(tmp_path: Path, family: str, others: Settings, tensors: dict[str, np.ndarray] | None = None) -> Settings:
    """What is read of a file with other settings and tensors."""
    architecture, other, named, usual = FILES[family]
    model = made(family, other)
    settings = {**settings_of(model, named, usual), **others}
    return dict(gguf_source(write(model, tmp_path / "other.gguf", architecture, settings, tensors)).config)


def test_the_largest_gemma_scales_queries_otherwise():
    """llama.cpp knows Gemma 2 27B and Gemma 3 27B by their blocks; their files say nothing of it."""
    for architecture, blocks, hidden, heads, scalar in (
        ("gemma2", 42, 3584, 16, 256), ("gemma2", 46, 4608, 32, 144), ("gemma3", 48, 3840, 16, 256),
        ("gemma3", 62, 5376, 32, 168),
    ):  # fmt: skip
        of_model = {"context_length": 8192, "feed_forward_length": 4 * hidden, "attention.layer_norm_rms_epsilon": 1e-6,
                    "block_count": blocks, "embedding_length": hidden, "attention.head_count": heads,
                    "attention.key_length": 128 if scalar < 256 else 256, "attention.sliding_window": 1024}  # fmt: skip
        settings = {f"{architecture}.{key}": value for key, value in of_model.items()}
        settings["general.architecture"] = architecture
        contents = Contents(Path("gemma.gguf"), settings, {"token_embd.weight": (64, hidden)}, {})
        assert gguf_config(contents, ARCHITECTURES[architecture]).query_pre_attn_scalar == scalar


def test_a_count_of_no_experts_is_none(tmp_path):
    config = config_of(tmp_path, "smollm3", {"expert_count": 0, "expert_used_count": 0})
    assert config["model_type"] == "smollm3"


def test_phi_3_has_a_rotation_for_each_of_two_lengths(tmp_path):
    factors = {f"rope_factors_{kind}.weight": np.linspace(1, most, 6, dtype=np.float32) for kind, most in
               (("short", 1.5), ("long", 40.0))}  # fmt: skip
    config = config_of(
        tmp_path, "phi3",
        {"rope.dimension_count": 12, "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25,
         "attention.sliding_window": 0}, factors,
    )  # fmt: skip
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["attention_factor"], rope["partial_rotary_factor"]) == ("longrope", 1.25, 0.75)
    for kind in ("short", "long"):
        assert rope[f"{kind}_factor"] == factors[f"rope_factors_{kind}.weight"].tolist()
    assert config["original_max_position_embeddings"] == rope["original_max_position_embeddings"] == 64
    assert config.get("sliding_window") is None  # 0 tells Phi-4, which has none


@pytest.mark.parametrize(
    ("family", "others", "words"),
    [
        ("gemma2", {"attention.value_length": 16}, "has heads of 24 numbers in keys and 16 in values"),
        (
            "olmo2",
            {"attention.sliding_window": 8},
            r"sets olmo2\.attention\.sliding_window = 8, which is not known of olmo2",
        ),
        ("olmo2", {"feed_forward_length": [128, 64, 128, 64]}, r"feed_forward_length for each block apart \(\[128, 64"),
        ("gpt_oss", {"rope.scaling.yarn_log_multiplier": 0.1}, "scales its rotation as 'yarn'"),
        ("olmo2", {"rope.scaling.alpha": 2.0}, "scales its rotation as 'none'"),
        ("qwen3_5_text", {"nextn_predict_layers": 1, "block_count": 5}, None),
    ],
)
def test_what_would_run_as_another_model_is_refused(family, others, words, tmp_path):
    if words:
        with pytest.raises(UnsupportedModel, match=words):
            config_of(tmp_path, family, others)
        return
    heads = {"blk.4.nextn.eh_proj.weight": np.zeros((64, 128), np.float32)}
    with pytest.raises(
        UnsupportedModel, match=r"blk\.4\.nextn\.eh_proj\.weight in .* has no place in Qwen3_5ForCausalLM"
    ):
        config_of(tmp_path, family, others, heads)


@pytest.mark.parametrize("architecture", ["falcon", "mamba", "gemma4", "deepseek2", "minimax-m2", "t5"])
def test_an_architecture_without_a_line_is_refused_by_its_name(architecture, tmp_path):
    writer = package.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_block_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModel, match=f"of the architecture '{architecture}', which is not read from GGUF here"
    ):
        gguf_source(tmp_path / "model.gguf")
