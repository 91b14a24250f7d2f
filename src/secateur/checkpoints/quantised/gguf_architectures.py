"""llama.cpp's architectures that are read: which model of transformers each is, what its settings
are called there, and how the weights are put back as they were.

llama.cpp's converter stores some weights changed (rows of query and key in another order, norms
with one added, matrices transposed), and llama.cpp computes some things that no setting says. Both
are known here for each architecture by name, since a model that is read without them runs, and
answers as another one. An architecture without a line is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Fields = dict[str, Any]
"""Settings of a configuration of transformers."""
Undo = Callable[[Any, np.ndarray], np.ndarray]
"""What makes a weight as transformers has it of a configuration and the weight in the file."""
NONE: Mapping[str, Any] = MappingProxyType({})


def rows_of_halves(heads: str) -> Undo:
    """Rows 0, half, 1, half + 1, … of each head in the order 0, 1, 2, …; `heads` is the setting
    that counts them.
    """

    def undo(config: Any, weights: np.ndarray) -> np.ndarray:
        pairs = weights.reshape(getattr(config, heads), -1, 2, *weights.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weights.shape)

    return undo


def less_one(_: Any, weights: np.ndarray) -> np.ndarray:
    """A norm's weight, to which transformers adds one itself."""
    return weights - 1


def transposed(_: Any, weights: np.ndarray) -> np.ndarray:
    """The weight of a Conv1D, which is [in, out]."""
    return weights.T


def by_heads(config: Any, weights: np.ndarray) -> np.ndarray:
    """Query, key and value of each head together, from all queries, all keys and all values."""
    thirds = weights.reshape(3, config.num_attention_heads, -1, *weights.shape[1:])
    return thirds.swapaxes(0, 1).reshape(weights.shape)


def gates_in_turn(_: Any, weights: np.ndarray) -> np.ndarray:
    """Gate and up of gpt-oss, whose rows transformers has in turn, as columns or as biases."""
    halves = weights.reshape(len(weights), 2, -1, *weights.shape[2:])  # [experts, 2, inner, …]
    return halves.swapaxes(1, 2).reshape(weights.shape).swapaxes(1, -1)


def columns(_: Any, weights: np.ndarray) -> np.ndarray:
    """Matrices of experts that transformers keeps as [experts, in, out]."""
    return weights.swapaxes(1, 2)


def values_in_groups(
    part: Callable[[Any], int] = lambda config: 1, *, first: int = 0, axis: int = 0
) -> Undo:
    """Value heads of linear attention in the groups of their keys, where llama.cpp has the first of
    each group, then the second of each. `part` is how many rows (along `axis`) each has, and the
    rows of the first `first` sizes of all keys in front of them stay.
    """

    def undo(config: Any, weights: np.ndarray) -> np.ndarray:
        keys = config.linear_num_key_heads
        start = first * keys * config.linear_key_head_dim
        front, back = np.split(np.moveaxis(weights, axis, 0), [start])
        groups = back.reshape(-1, keys, part(config), *back.shape[1:])
        back = groups.swapaxes(0, 1).reshape(back.shape)
        return np.moveaxis(np.concatenate([front, back]), 0, axis)

    return undo


def _log_of_decay(config: Any, weights: np.ndarray) -> np.ndarray:
    return values_in_groups()(config, np.log(-weights))


class Architecture(NamedTuple):
    """What is known of one of llama.cpp's architectures.

    `model_type` is transformers'; `settings` names what is called otherwise than in `SETTINGS`,
    with an empty name for what changes nothing; `fixed` is what follows from the
    fields that are known and the settings of the file. `undo` has, by the
    end of a tensor's name, what puts it back, and `names` the tensors behind a parameter that the
    `gguf` package does not know. `turns_part`: a part of each head may stay as it is.
    """

    model_type: str
    settings: Mapping[str, str] = NONE
    fixed: Callable[[Fields, Fields], Fields] = lambda fields, settings: {}
    undo: Mapping[str, Undo] = NONE
    names: Mapping[str, tuple[str, ...]] = NONE
    turns_part: bool = False


SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""What most settings of GGUF are called in a configuration."""

_LLAMA = {
    f"attn_{part}.{kind}": rows_of_halves(heads)
    for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in ("weight", "bias")
}
_GEMMA = {"norm.weight": less_one}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
EXPERTS = {
    "experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts.down_proj": ("ffn_down_exps.weight",),
    "experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "experts.down_proj_bias": ("ffn_down_exps.bias",),
}
"""The tensors of the experts of a block, by the end of the parameter that they make."""


def _size(config: Any) -> int:
    return config.linear_value_head_dim


_QWEN35 = {
    "attn_gate.weight": values_in_groups(_size),
    "attn_qkv.weight": values_in_groups(_size, first=2),
    "ssm_conv1d.weight": values_in_groups(_size, first=2),
    "ssm_out.weight": values_in_groups(_size, axis=1),
    "ssm_alpha.weight": values_in_groups(),
    "ssm_beta.weight": values_in_groups(),
    "ssm_dt.bias": values_in_groups(),
    "ssm_a": _log_of_decay,
    **{
        f"{name}_norm.weight": less_one
        for name in ("output", "attn", "post_attention", "attn_q", "attn_k")
    },
}
_QWEN35_NAMES = {"linear_attn.dt_bias": ("ssm_dt.bias",)}
_QWEN35_SETTINGS = {
    "full_attention_interval": "",
    "nextn_predict_layers": "",
    "rope.dimension_sections": "",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "",
}


def _qwen35(fields: Fields, settings: Fields) -> Fields:
    """Every so manieth block is full attention, and blocks of a draft head are counted last."""
    blocks = settings["block_count"] - settings.get("nextn_predict_layers", 0)
    kinds = ("full_attention", "linear_attention")
    each = settings["full_attention_interval"]
    sections = [size for size in settings["rope.dimension_sections"] if size]
    mixed = {"mrope_section": sections, "mrope_interleaved": True}
    return {
        "num_hidden_layers": blocks,
        "layer_types": [kinds[bool((block + 1) % each)] for block in range(blocks)],
        "linear_value_head_dim": settings["ssm.inner_size"] // settings["ssm.time_step_rank"],
        "rope_parameters": fields["rope_parameters"] | mixed,
    }


def _lfm2(_: Fields, settings: Fields) -> Fields:
    """Blocks without heads for keys are convolutions."""
    heads = settings["attention.head_count_kv"]
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,  # the width is what it came to
    }


def _gemma_scale(largest: int) -> Callable[[Fields, Fields], Fields]:
    """Queries are divided by the root of a head's size; in the largest model, which llama.cpp
    tells by its blocks, by that of what each head would get of the hidden size.
    """

    def fixed(fields: Fields, _: Fields) -> Fields:
        shared = fields["hidden_size"] // fields["num_attention_heads"]
        whole = fields["num_hidden_layers"] == largest
        return {"query_pre_attn_scalar": shared if whole else fields["head_dim"]}

    return fixed


ARCHITECTURES = {
    "arcee": Architecture("arcee", undo=_LLAMA),
    "bloom": Architecture(
        "bloom",
        {"context_length": "", "feed_forward_length": "", "attention.head_count_kv": ""},
        undo={"attn_qkv.weight": by_heads, "attn_qkv.bias": by_heads},
    ),
    "cohere2": Architecture("cohere2", {"logit_scale": "logit_scale"}),
    "command-r": Architecture("cohere", {"logit_scale": "logit_scale"}),
    "exaone4": Architecture("exaone4"),
    "gemma": Architecture("gemma", undo=_GEMMA),
    "gemma2": Architecture(
        "gemma2",
        {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _gemma_scale(46),
        _GEMMA,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {"final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": ""},
        _gemma_scale(62),
        _GEMMA,
    ),
    "glm4": Architecture("glm4", turns_part=True),
    "gpt-oss": Architecture(
        "gpt_oss",
        {"expert_feed_forward_length": "intermediate_size", "feed_forward_length": ""},
        fixed=lambda fields, _: {
            "rope_parameters": fields["rope_parameters"] | {"truncate": False}
        },
        undo={
            "ffn_gate_exps.weight": gates_in_turn,
            "ffn_gate_exps.bias": gates_in_turn,
            "ffn_down_exps.weight": columns,
        },
        names={"self_attn.sinks": ("attn_sinks.weight",)},
    ),
    "gpt2": Architecture(
        "gpt2",
        {"feed_forward_length": "n_inner"},
        undo={
            f"{name}.weight": transposed
            for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        },
    ),
    "granite": Architecture("granite", _GRANITE, undo=_LLAMA),
    "granitemoe": Architecture(
        "granitemoe",
        {**_GRANITE, "expert_count": "num_local_experts"},
        undo=_LLAMA,
        names={"router.weight": ("ffn_gate_inp.weight",)},
    ),
    "lfm2": Architecture(
        "lfm2", {"attention.head_count_kv": "", "shortconv.l_cache": "conv_L_cache"}, _lfm2
    ),
    "llama": Architecture("llama", undo=_LLAMA),
    "nemotron": Architecture("nemotron", undo=_GEMMA, turns_part=True),
    "olmo": Architecture("olmo", {"attention.clamp_kqv": "clip_qkv"}, undo=_LLAMA),
    "olmo2": Architecture("olmo2"),
    "olmoe": Architecture("olmoe"),
    "phi2": Architecture("phi", turns_part=True),
    "phi3": Architecture(
        "phi3",
        {"rope.scaling.original_context_length": "original_max_position_embeddings"},
        turns_part=True,
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", fixed=lambda fields, _: {"norm_topk_prob": True}),
    "qwen35": Architecture(
        "qwen3_5_text", _QWEN35_SETTINGS, _qwen35, _QWEN35, _QWEN35_NAMES, turns_part=True
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", _QWEN35_SETTINGS, _qwen35, _QWEN35, _QWEN35_NAMES, turns_part=True
    ),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", undo=_LLAMA),
    "stablelm": Architecture(
        "stablelm", {"use_parallel_residual": "use_parallel_residual"}, turns_part=True
    ),
    "starcoder2": Architecture("starcoder2"),
}
"""By llama.cpp's name of the architecture."""
MIXTURES = {"llama": Architecture("mixtral", undo=_LLAMA)}
"""What an architecture is where it has experts."""
