"""The configuration of the model in a GGUF file.

transformers maps the common settings of an architecture and drops the others without a word: a
head size of its own, the base of the rotation, the width of experts, scaled rotation, which
llama.cpp stores as factors in tensors. So the settings are read here, each by its name
(gguf_architectures.py). One that nobody knows is refused, since the model would run as another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoConfig

from secateur.checkpoints.quantised.gguf_architectures import (
    ARCHITECTURES,
    MIXTURES,
    SETTINGS,
    Architecture,
    Fields,
)
from secateur.errors import BadCheckpoint, UnsupportedModel

FOLLOWS = re.compile(
    r"vocab_size|rope\.(dimension_count|freq_base)|rope\.scaling\..*|attention\.value_length"
    r"|attention\.layer_norm(_rms)?_epsilon|tensor_data_layout|attention\.sliding_window_pattern"
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
SCALING = {"type", "factor", "original_context_length", "finetuned", "attn_factor"}
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXTS = (8192, *(2**power for power in range(4, 18)))
"""Trained contexts that are tried: Llama 3's own, and powers of two."""
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
FLAGS = {
    "attention_bias": "attn_q.bias",
    "use_qkv_bias": "attn_q.bias",
    "use_bias": "attn_q.bias",
    "attention_out_bias": "attn_output.bias",
    "mlp_bias": "ffn_up.bias",
    "use_qk_norm": "attn_q_norm.weight",
}
"""Which tensor of the first block says that a configuration has one."""
Settings = dict[str, Any]


class Contents(NamedTuple):
    """What a GGUF file says of its model: its settings, the shapes of its tensors as torch has
    them, and the factors of its rotation by the names of their tensors.
    """

    file: Path
    settings: Settings
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, np.ndarray]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.settings["general.architecture"]

    def own(self) -> Settings:
        """The settings of the architecture, without its name in front; numbers of 32 bits as they
        were written: 1e-06, not 9.999999974752427e-07.
        """
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): float(str(np.float32(v))) if isinstance(v, float) else v
            for key, v in self.settings.items()
            if key.startswith(prefix)
        }

    def refused(self, what: str) -> UnsupportedModel:
        """The error for a file that would be read as another model."""
        return UnsupportedModel(
            f"{self.file} {what}: it would run as another model. Use the original checkpoint."
        )


def architecture_in(contents: Contents) -> Architecture:
    """What is known of the architecture. Raises UnsupportedModel where nothing is."""
    name = contents.architecture
    mixtures = MIXTURES if contents.own().get("expert_count") else {}
    if architecture := {**ARCHITECTURES, **mixtures}.get(name):
        return architecture
    raise UnsupportedModel(
        f"{contents.file} holds a model of the architecture {name!r}, which is not read from GGUF "
        f"here. Use the original checkpoint. Known: {', '.join(sorted(ARCHITECTURES))}."
    )


def gguf_config(contents: Contents, architecture: Architecture) -> Any:
    """The configuration of the model. Raises UnsupportedModel for a setting that is not known,
    BadCheckpoint where one is missing.
    """
    default: Any = AutoConfig.for_model(architecture.model_type)
    settings = contents.own()
    _refuse_missing(contents, settings, default)
    fields = _named(contents, architecture, settings, default)
    fields |= _followed(contents, settings, default)
    fields |= _heads(contents, settings, default)
    if hasattr(default, "rope_parameters"):
        fields["rope_parameters"] = _rotation(contents, architecture, settings, default)
    fields |= architecture.fixed(fields, settings)
    own_names = {default.attribute_map.get(name, name): value for name, value in fields.items()}
    return AutoConfig.for_model(architecture.model_type, **own_names)


def _refuse_missing(contents: Contents, settings: Settings, default: Any) -> None:
    """Raise BadCheckpoint where a setting is missing for which llama.cpp has no default; that of
    transformers is another model's.
    """
    for names in NEEDED:
        field = SETTINGS.get(names[0])
        if (field is None or hasattr(default, field)) and settings.keys().isdisjoint(names):
            keys = " or ".join(f"{contents.architecture}.{name}" for name in names)
            raise BadCheckpoint(f"{contents.file} does not set {keys}. Fetch it again.")


def _named(
    contents: Contents, architecture: Architecture, settings: Settings, default: Any
) -> Fields:
    """What the settings with a name in the configuration say."""
    fields: Fields = {}
    names = {**SETTINGS, **architecture.settings}
    for key, value in settings.items():
        name = names.get(key)
        known = name == "" or (name and hasattr(default, name))
        none = key.startswith("expert_") and value == 0  # experts that there are not
        if not known and not none and not FOLLOWS.fullmatch(key) and key != "attention.key_length":
            raise contents.refused(
                f"sets {contents.architecture}.{key} = {str(value)[:40]}, which is not known of "
                f"{architecture.model_type}"
            )
        if name and isinstance(value, list):
            raise contents.refused(
                f"sets {contents.architecture}.{key} for each block apart ({str(value)[:40]})"
            )
        if name and known:
            fields[name] = value
    return fields


def _followed(contents: Contents, settings: Settings, default: Any) -> Fields:
    """What follows from tensors and from settings of several names."""
    fields: Fields = {
        "vocab_size": contents.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in contents.shapes,
    }
    fields |= {
        name: f"blk.0.{tensor}" in contents.shapes
        for name, tensor in FLAGS.items()
        if hasattr(default, name)
    }
    for name, token in TOKENS.items():
        fields[name] = contents.settings.get(f"tokenizer.ggml.{token}_token_id")
    if "attention.head_count_kv" not in settings and hasattr(default, "num_key_value_heads"):
        fields["num_key_value_heads"] = settings["attention.head_count"]
    epsilons = [settings[key] for key in sorted(settings) if key.endswith("_epsilon")]
    if epsilons and (names := [name for name in EPSILONS if hasattr(default, name)]):
        fields[names[0]] = epsilons[0]
    window, pattern = (settings.get(f"attention.sliding_window{end}") for end in ("", "_pattern"))
    if hasattr(default, "sliding_window"):
        fields["sliding_window"] = window or None  # 0 says that there is none
    if pattern is not None and not hasattr(default, "layer_types"):
        raise contents.refused("says which blocks see a window only")
    if isinstance(pattern, int):  # each so manieth block sees everything
        pattern = [bool((block + 1) % pattern) for block in range(settings["block_count"])]
    if pattern is not None:
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]
    return fields


def _heads(contents: Contents, settings: Settings, default: Any) -> Fields:
    """The size of a head, which llama.cpp takes from the hidden size where it is not set."""
    usual = settings["embedding_length"] // settings["attention.head_count"]
    size = settings.get("attention.key_length", usual)
    values = settings.get("attention.value_length", size)
    if values != size or (size != usual and not hasattr(default, "head_dim")):
        raise contents.refused(
            f"has heads of {size} numbers in keys and {values} in values, and {usual} are taken"
        )
    return {"head_dim": size} if hasattr(default, "head_dim") else {}


def _rotation(
    contents: Contents, architecture: Architecture, settings: Settings, default: Any
) -> Fields:
    """How positions are told, as `rope_parameters`."""
    head = _heads(contents, settings, default).get(
        "head_dim", settings["embedding_length"] // settings["attention.head_count"]
    )
    width = settings.get("rope.dimension_count", head)
    if width != head and not architecture.turns_part:
        raise contents.refused(f"rotates {width} of the {head} numbers of a head")
    theta = settings.get("rope.freq_base", 10000.0)
    rope: Fields = {"rope_type": "default", "rope_theta": theta}
    if architecture.turns_part:
        rope["partial_rotary_factor"] = width / head
    rope |= _scaled_rotation(contents, settings, theta)
    if "full_attention" in (default.rope_parameters or {}):
        near = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": rope, "sliding_attention": near}
    return rope


def _scaled_rotation(contents: Contents, settings: Settings, theta: float) -> Fields:
    """What the file says of a context longer than the one that was trained; empty without."""
    prefix = "rope.scaling."
    scaling = {key.removeprefix(prefix): v for key, v in settings.items() if key.startswith(prefix)}
    kind, factor = scaling.get("type", "none"), float(scaling.get("factor", 1.0))
    trained = {"original_max_position_embeddings": scaling.get("original_context_length")}
    known = scaling.keys() <= SCALING | (YARN.keys() if kind == "yarn" else set())
    if "rope_factors_long.weight" in contents.factors and known:
        return _two_lengths(contents, trained, scaling)
    known = known and scaling.get("attn_factor", 1.0) == 1.0
    if "rope_freqs.weight" in contents.factors and known:
        return _llama_3(contents, theta)
    if known and (kind == "none" or factor == 1.0):
        return {}
    if kind == "linear" and known:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and known and trained["original_max_position_embeddings"]:
        betas = {name: scaling[key] for key, name in YARN.items() if key in scaling}
        return {"rope_type": "yarn", "factor": factor, **trained, **betas}
    raise UnsupportedModel(
        f"{contents.file} scales its rotation as {kind!r} ({scaling}), which is not known. Use the "
        "original checkpoint."
    )


def _two_lengths(contents: Contents, trained: Fields, scaling: Settings) -> Fields:
    """Phi-3's scaling: factors for texts within the trained context, and for longer ones."""
    long, short = (contents.factors[f"rope_factors_{kind}.weight"] for kind in ("long", "short"))
    return {
        "rope_type": "longrope",
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "attention_factor": scaling.get("attn_factor", 1.0),
        **trained,
    }


def _llama_3(contents: Contents, theta: float) -> Fields:
    """Llama 3's scaling, for the trained context that gives the stored factors to four digits."""
    factors = contents.factors["rope_freqs.weight"]
    factor, low, high = float(factors.max()), *LLAMA_3.values()
    half = len(factors)
    lengths = 2 * np.pi * theta ** (np.arange(half) / half)  # wavelengths in tokens
    for context in CONTEXTS:
        ramp = ((context / lengths - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / ((1 - ramp) / factor + ramp), factors, rtol=1e-4):
            trained = {"original_max_position_embeddings": context}
            return {"rope_type": "llama3", "factor": factor, **LLAMA_3, **trained}
    raise UnsupportedModel(
        f"{contents.file} holds factors of rotation (rope_freqs) that are not those of Llama 3. "
        "Use the original checkpoint."
    )
