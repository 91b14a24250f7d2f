"""Tiny random vision-language (and audio-language) models: a text part as in `families`, and a tower that outweighs it.

The tower has wider blocks than the text part on purpose: whoever takes the largest list of modules for the language
model's blocks prunes the wrong one. Nothing is downloaded.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from support.families import BLOCKS, HIDDEN, SMALL, SPECIAL

MULTIMODAL = """
    aria aya_vision cohere2_vision deepseek_vl emu3 ernie4_5_vl_moe exaone4_5 gemma3 gemma4 glm46v glm4v glm4v_moe
    glm_ocr got_ocr2 granite_speech idefics2 idefics3 internvl janus lfm2_vl lfm3_vl lighton_ocr llava llava_next
    llava_next_video llava_onevision minicpmv4_6 mistral3 ovis2 paddleocr_vl paligemma qwen2_5_omni_thinker
    qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe
    smolvlm video_llama_3 video_llava vipllava voxtral
""".split()  # noqa: SIM905
"""Families whose text part can be pruned."""

TOWER = {
    "hidden_size": 96, "embed_dim": 96, "d_model": 96, "intermediate_size": 384, "encoder_ffn_dim": 384,
    "num_hidden_layers": 3, "depth": 3, "encoder_layers": 3, "num_layers": 3, "num_attention_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "image_size": 32, "patch_size": 16,
    "out_hidden_size": HIDDEN, "output_dim": HIDDEN, "projection_dim": HIDDEN, "vocab_size": 8,
    "deepstack_visual_indexes": [0, 1, 2], "fullatt_block_indexes": [1], "num_position_embeddings": 16,
    "spatial_merge_size": 2, "window_size": 64, "num_mel_bins": 8, "max_source_positions": 16, "n_window": 4,
    "conv_channels": 8, "downsample_hidden_size": 16, "cross_attention_frequency": 1, "encoder_hidden_size": 32,
    "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "codebook_size": 64, "num_embeddings": 64,
    "position_embedding_size": 64,
}  # fmt: skip
"""The sizes of a tower, by whatever name its configuration has for them."""


SECTIONS = {
    "ernie4_5_vl_moe_text": [3, 3, 2], "glm4v_text": [3, 3, 2], "glm4v_moe_text": [2, 1, 1], "glm_ocr_text": [2, 3, 3],
    "paddleocr_vl_text": [2, 3, 3],
    "qwen2_5_omni_text": [2, 3, 3], "qwen2_5_vl_text": [2, 3, 3], "qwen2_vl_text": [2, 3, 3],
}  # fmt: skip
"""How families that tell height from width share out the halves of a head."""


OTHERWISE: dict[str, dict[str, Any]] = {
    "aria_text": {"intermediate_size": 64},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64]},
    "mllama_text_model": {
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


WHOLE: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGAZ": 121, "IMGIMGBZ": 122}},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122}},
}
"""What families whose images are words of the vocabulary need, beside the sizes of their parts."""


def _settable(config: PreTrainedConfig, name: str) -> bool:
    name = config.attribute_map.get(name, name)
    return name in config.to_dict() and not isinstance(getattr(type(config), name, None), property)


def _text(default: PreTrainedConfig) -> PreTrainedConfig:
    """The text configuration with the sizes of `families`."""
    fields: dict[str, Any] = {name: value for name, value in SMALL.items() if _settable(default, name)}
    for name in ("layer_types", "mlp_layer_types"):
        if _settable(default, name) and (kinds := getattr(default, name)):
            fields[name] = (list(dict.fromkeys(kinds)) * BLOCKS)[:BLOCKS]
    if (sections := SECTIONS.get(default.model_type)) is not None:
        fields["rope_parameters"] = {**default.rope_parameters, "mrope_section": sections}
    fields |= OTHERWISE.get(default.model_type, {})
    return type(default)(**{**fields, **SPECIAL.get(default.model_type, {})})


def tiny_multimodal_config(model_type: str) -> PreTrainedConfig:
    """The family's default configuration, its text part as in `families`, its towers wider than that."""
    default = AutoConfig.for_model(model_type)
    text: Any = default.get_text_config()
    parts: dict[str, Any] = {}
    for name in default.sub_configs:
        part: Any = getattr(default, name, None)
        if part is None and name == "vision_config":
            part = AutoConfig.for_model(f"{model_type}_vision")
        if part is not None and part is text:
            parts[name] = _text(part)
        elif part is not None:
            parts[name] = type(part)(**{key: value for key, value in TOWER.items() if _settable(part, key)})
    whole = {
        "projector_hidden_size": HIDDEN,
        "alignment_intermediate_size": HIDDEN,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    special = [
        key for key in sorted(default.to_dict()) if key.endswith(("token_id", "token_index")) and key not in whole
    ]
    whole |= {key: 100 + i for i, key in enumerate(special) if getattr(default, key) is not None}
    if text is default:  # a configuration without one for its text
        whole = SMALL | whole
    settable = {key: value for key, value in whole.items() if _settable(default, key)}
    return AutoConfig.for_model(model_type, **parts, **settable, **WHOLE.get(model_type, {}))


def tiny_multimodal(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the family in eval mode; the same seed gives the same bits."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        config = tiny_multimodal_config(model_type)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
