"""The parts of a model that sees or hears as well as reads: which class loads it, and which part is
the language model.

Such a model's configuration holds one for its text (`text_config`), and the module that was built
from it is the language model. Towers and projectors beside it are read and written back, and never
pruned: no text goes through them.
"""

from collections import Counter
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from secateur.errors import UnsupportedModel


def loader(config: Any) -> Any:
    """The class of transformers that builds and loads the model of a configuration.

    A family may have a class for its text alone, and one for all of its parts: `architectures` says
    which of them a checkpoint is.
    """
    family: Any = getattr(config, "model_type", "")
    named = getattr(config, "architectures", None)
    whole = str(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(family, ""))
    text_alone = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, ""))
    if not whole or text_alone in (named or ()):
        return AutoModelForCausalLM
    nested = config.get_text_config() is not config
    return AutoModelForMultimodalLM if nested or not text_alone else AutoModelForCausalLM


def architecture_of(config: Any) -> str:
    """The name of the class by which the model of a configuration is loaded."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if loader(config) is AutoModelForMultimodalLM:
        names = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return str(names.get(config.model_type, type(config).__name__))


def language_part(model: nn.Module) -> str:
    """The name of the module that was built from the configuration of the text; empty where that is
    the whole model. Raises UnsupportedModel where there is none.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(model, PreTrainedModel) else config
    if text is config:
        return ""
    for name, module in model.named_modules():  # from the outermost inwards
        if getattr(module, "config", None) is text and isinstance(module, PreTrainedModel):
            return name
    raise UnsupportedModel(
        f"{type(model).__name__} has a configuration for text ({type(text).__name__}), and no "
        "module that is built from it. A model that transformers loads is wanted."
    )


def other_parts(model: PreTrainedModel) -> dict[str, int]:
    """How many tensors the parts beside the language model have, by the name of the part."""
    if not (text := language_part(model)):
        return {}
    inside, _, _ = text.rpartition(".")
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    left = [f"{text}.", *(f"{name}." for name, module in model.named_modules() if module in ends)]
    names = [name for name in model.state_dict() if not name.startswith(tuple(left))]
    parts = Counter(name.removeprefix(f"{inside}.").partition(".")[0] for name in names)
    return dict(parts)


def parts_in_words(model: PreTrainedModel) -> str:
    """A sentence on the parts that no text goes through; empty where there are none."""
    counts = other_parts(model)
    parts = [
        f"{name.replace('_', ' ')}, {n} tensor{'s' * (n > 1)}" for name, n in sorted(counts.items())
    ]
    return f"Left as it is, since no text goes through it: {'; '.join(parts)}." if parts else ""
