"""The stock configuration that holds a smaller model, or the reason why there is none.

No table of families: the fields of a configuration that hold the old number get the new one, the
family builds its model from that without memory (torch's meta device), and its shapes say whether
it is the model that is wanted. A wrong guess has other shapes, and what shapes do not show is
compared in numbers (`program`).
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from secateur.errors import UnsupportedModel
from secateur.models.load import find_stack
from secateur.models.replay import LanguageModel

Shapes = Mapping[str, tuple[int, ...]]

CARRIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "mistral",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    )
}
"""Families that compute the same, where a family's own configuration refuses the numbers: Llama
wants the hidden size to be a multiple of its heads, although it has a `head_dim`; Mistral does not.
"""
LEADING = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Fields that say something of the first so many blocks."""


CONVERSIONS = "_weight_conversions"
"""What transformers keeps of the renamings of a checkpoint that it has loaded."""
FIELDS = {
    "channels": ("inter", "inner", "ffn", "ff", "mlp", "expansion"),
    "heads": ("head",),
    "experts": ("expert",),
}
"""What the name of a field contains that says how many there are of a kind."""


@dataclass(frozen=True)
class Number:
    """A number of a configuration that changes, of channels, heads or experts."""

    old: int
    new: int
    of: str

    def instead_of(self, value: int | None) -> int:
        """What a field becomes that held the old number, twice that (gate and up), or nothing."""
        return self.new * (value or self.old) // self.old


def find_target(
    language_model: LanguageModel, shapes: Shapes, numbers: Sequence[Number], kept: Sequence[int]
) -> tuple[LanguageModel, Mapping[str, Any]] | None:
    """The model with exactly these `shapes` by name, on the meta device, and what it changes in the
    source's `config.json`, in the part for the text; None where no configuration has them.

    `numbers` are those that change, `kept` the blocks that stay.
    """
    config = language_model.model.config
    text, path = config.get_text_config(), path_of_text(config)
    bases: list[tuple[Any, dict[str, Any]]] = [(type(config), {})]
    if text.model_type in CARRIERS:
        family, fields = CARRIERS[text.model_type]
        bases.append((type(config) if path else type(AutoConfig.for_model(family)), fields))
    for kind, fields in bases:
        for changes in _candidates(text, numbers, kept):
            model = _built(kind, _changed(config, path, changes | fields), language_model)
            if model is not None and tensor_shapes(model) == shapes:
                # how names on disk become those of modules: what the loader found for the source
                if hasattr(language_model.model, CONVERSIONS):
                    setattr(model, CONVERSIONS, getattr(language_model.model, CONVERSIONS))
                tuples = tuple(language_model.tuples[i] for i in kept)
                smaller = LanguageModel(model, find_stack(model), tuples)
                return smaller, {**changes, **fields}
    return None


def path_of_text(config: Any) -> tuple[str, ...]:
    """Under which names a configuration holds the one for the text; none where it is that."""
    text = config.get_text_config()
    if text is config:
        return ()
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and (part is text or part.get_text_config() is text):
            return (name, *path_of_text(part))
    raise UnsupportedModel(f"{type(config).__name__} does not say where its text part is.")


def _changed(config: Any, path: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a dictionary, with changes to the part at the end of the path."""
    fields = part = config.to_dict()
    for name in path:
        part = part[name]
    part.update(changes)
    return fields


def tensor_shapes(model: nn.Module) -> Shapes:
    """The shapes of all stored tensors by their name in the model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def empty(language_model: LanguageModel) -> LanguageModel:
    """The same model on the meta device: modules and shapes, no numbers."""
    config = language_model.model.config
    model = _built(type(config), config.to_dict(), language_model)
    return LanguageModel(model, language_model.stack, language_model.tuples)


def _built(kind: Any, fields: dict[str, Any], language_model: LanguageModel) -> Any:
    """The model of a configuration, on the meta device, or None where it refuses the fields."""
    try:
        config = kind.from_dict(fields)
        config._attn_implementation = language_model.model.config._attn_implementation
        text = config.get_text_config()  # which may attend in another way than the whole says
        text._attn_implementation = language_model.text_config._attn_implementation
        with torch.device("meta"):
            own = type(language_model.model) if kind is type(language_model.model.config) else None
            model = own(config) if own else AutoModelForCausalLM.from_config(config)
    # whatever a configuration or a constructor raises for numbers that it cannot hold
    except Exception:
        return None
    return model.eval()


def _candidates(
    config: Any, numbers: Sequence[Number], kept: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Changes to fields of a configuration that may give the numbers, few fields first."""
    values = config.to_dict()
    depth = _fewer_blocks(config, values, kept)
    choices = []
    for number in numbers:
        names = [name for name, value in values.items() if _may_hold(name, value, number)]
        sets = [chosen for size in (1, 2, 3) for chosen in combinations(names, size)]
        choices.append(
            [{name: number.instead_of(values[name]) for name in chosen} for chosen in sets]
        )
    # the width of a head, which many derive from their number unless it is said
    widths: list[dict[str, Any]] = [{}]
    if any(number.of == "heads" for number in numbers):
        width = values.get("head_dim") or config.hidden_size // config.num_attention_heads
        widths.insert(0, {"head_dim": width})
    for explicit, *chosen in product(widths, *choices):
        changes = depth | explicit
        for part in chosen:
            changes |= part
        yield changes


def _may_hold(name: str, value: Any, number: Number) -> bool:
    if not any(part in name for part in FIELDS[number.of]) or isinstance(value, bool):
        return False
    if number.of == "channels":  # GPT-2's n_inner is 4 x hidden where it is not said
        return value in (number.old, 2 * number.old, None)
    return value == number.old


def _fewer_blocks(config: Any, values: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The fields that count blocks or list something for each of them, for the blocks that stay."""
    total = config.num_hidden_layers
    if len(kept) == total:
        return {}
    changes: dict[str, Any] = {
        config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(kept)
    }
    for name, value in values.items():
        listed = isinstance(value, (list, tuple)) and not name.endswith(("_id", "_ids", "_classes"))
        if listed and len(value) == total:
            changes[name] = [deepcopy(value[i]) for i in kept]
        if name in LEADING and isinstance(value, int):
            changes[name] = sum(i < value for i in kept)
    return changes
