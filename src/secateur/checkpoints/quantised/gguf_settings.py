"""The configuration of the model in a GGUF file, with what transformers leaves unread.

transformers maps the common settings of an architecture and drops the others without a word: a
head size of its own, the width of experts, scaled rotation, which llama.cpp stores as factors in a
tensor. Those are read here. A setting that nobody reads is refused, since the model would run as
another one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from secateur.errors import BadCheckpoint, UnsupportedModel

READ_HERE = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""What these settings of GGUF are called in a configuration."""
FOLLOWS = re.compile(
    r"vocab_size|rope\.dimension_count|rope\.scaling\..*|attention\.(value_length|causal)"
    r"|tensor_data_layout|attention\.sliding_window_pattern|attention\.layer_norm_epsilon"
)
"""Settings that are read elsewhere here, follow from others, or change nothing."""
NEEDED = (
    ("context_length",),
    ("embedding_length",),
    ("block_count",),
    ("feed_forward_length",),
    ("attention.head_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
"""Settings without which llama.cpp loads no file, one of each line."""
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXTS = (8192, *(2**power for power in range(4, 18)))
"""Trained contexts that are tried: Llama 3's own, and powers of two."""
Settings = dict[str, Any]


def gguf_config(file: Path, settings: Settings, rope_factors: np.ndarray | None) -> Any:
    """The configuration as transformers reads it, completed. Raises UnsupportedModel for a setting
    that is not known, BadCheckpoint where one is missing, and what transformers raises.
    """
    architecture = settings["general.architecture"]
    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if architecture in GGUF_CONFIG_ARCHS:
        return config
    mapped = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    _refuse_missing(file, settings, mapped)
    for key, value in settings.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or mapped.get(name):
            continue
        if name in READ_HERE and hasattr(config, READ_HERE[name]):
            setattr(config, READ_HERE[name], value)
        elif name == "attention.key_length" and value == _usual_head_size(config):
            continue
        elif name not in mapped and not FOLLOWS.fullmatch(name):
            raise UnsupportedModel(
                f"{file} sets {key} = {str(value)[:40]}, which is not known of "
                f"{config.model_type}: it would run as another model. Use the original checkpoint."
            )
    _refuse_partial_rotation(file, settings, config)
    scaled = _scaled_rotation(file, architecture, settings, config, rope_factors)
    if scaled:
        config.rope_parameters = {**config.rope_parameters, **scaled}
    return config


def _refuse_missing(file: Path, settings: Settings, mapped: Settings) -> None:
    """Raise BadCheckpoint where a setting is missing for which llama.cpp has no default; that of
    transformers is another model's.
    """
    for names in NEEDED:
        known = [name for name in names if mapped.get(name)]
        keys = [f"{settings['general.architecture']}.{name}" for name in known]
        if keys and settings.keys().isdisjoint(keys):
            raise BadCheckpoint(f"{file} does not set {' or '.join(keys)}. Fetch it again.")


def _usual_head_size(config: Any) -> int:
    """The size of a head where a configuration cannot name another."""
    return config.hidden_size // config.num_attention_heads


def _refuse_partial_rotation(file: Path, settings: Settings, config: Any) -> None:
    """Raise UnsupportedModel where another part of a head is rotated than transformers takes."""
    width = settings.get(f"{settings['general.architecture']}.rope.dimension_count")
    rope = getattr(config, "rope_parameters", None) or {}
    head = getattr(config, "head_dim", None) or _usual_head_size(config)
    part = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else 1.0
    if width is not None and width != int(head * part):
        raise UnsupportedModel(
            f"{file} rotates {width} of the {head} numbers of a head, and transformers takes "
            f"{int(head * part)} from it: it would run as another model. Use the original "
            "checkpoint."
        )


def _scaled_rotation(
    file: Path, architecture: str, settings: Settings, config: Any, factors: np.ndarray | None
) -> dict[str, Any]:
    """What the file says of a context longer than the one that was trained; empty without."""
    scaling = {
        key.removeprefix(f"{architecture}.rope.scaling."): value
        for key, value in settings.items()
        if key.startswith(f"{architecture}.rope.scaling.")
    }
    kind, factor = scaling.get("type", "none"), float(scaling.get("factor", 1.0))
    if factors is not None:
        return _llama_3(file, config, factors)
    if kind == "none" or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "original_context_length" in scaling:
        context = scaling["original_context_length"]
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    raise UnsupportedModel(
        f"{file} scales its rotation as {kind!r} ({scaling}), which is not known. Use the original "
        "checkpoint."
    )


def _llama_3(file: Path, config: Any, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, for the trained context that gives the stored factors to four digits."""
    factor, low, high = float(factors.max()), *LLAMA_3.values()
    theta, half = config.rope_parameters["rope_theta"], len(factors)
    lengths = 2 * np.pi * theta ** (np.arange(half) / half)  # wavelengths in tokens
    for context in CONTEXTS:
        ramp = ((context / lengths - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / ((1 - ramp) / factor + ramp), factors, rtol=1e-4):
            trained = {"original_max_position_embeddings": context}
            return {"rope_type": "llama3", "factor": factor, **LLAMA_3, **trained}
    raise UnsupportedModel(
        f"{file} holds factors of rotation (rope_freqs) that are not those of Llama 3. Use the "
        "original checkpoint."
    )
