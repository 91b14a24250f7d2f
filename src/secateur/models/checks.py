"""What is refused while a checkpoint is loaded, and in which words.

transformers loads much that is no causal language model, or not the one that its folder describes:
weights that are missing are made up, those it has no use for are dropped, encoders predict tokens
that they have seen.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import (
    LIBRARY_ERRORS,
    BadCheckpoint,
    NonFinite,
    SecateurError,
    UnsupportedModel,
    in_one_line,
)
from secateur.models.draft_heads import draft_head_count
from secateur.models.parts import loader
from secateur.models.replay import block_number
from secateur.system.json_files import json_object

LOAD_ERRORS = (*LIBRARY_ERRORS, StrictDataclassError)
"""What transformers raises for a configuration or weights that it cannot take."""
STORED = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")
"""In which dtypes tensors may be stored; the last four hold positions and masks."""
MOST_PARTS, SPARE_TENSORS, SPARE_BYTES = 2**16, 2**10, 2**28
"""Layers, heads or experts that no model has; how many parameters, and bytes of tables (masks,
rotary), a model may have beyond what its checkpoint holds.
"""
Shapes = Mapping[str, tuple[int, ...]]
_COUNTS = re.compile(r"(layers?|blocks?|experts?|heads?|depths?|labels)$")


def bad_config(folder: Path, error: BaseException) -> SecateurError:
    """What to raise where transformers cannot take the configuration in `folder`."""
    if "trust_remote_code" in str(error):
        return UnsupportedModel(
            f"{folder} needs code of its own (auto_map in config.json), which is not run unless "
            "asked for. Read that code, then add --trust-remote-code."
        )
    return UnsupportedModel(
        f"{folder / 'config.json'} describes no model that transformers knows: "
        f"{in_one_line(error)}."
    )


def bad_weights(
    folder: Path, shapes: Shapes, config: Any, built: nn.Module | None, error: BaseException
) -> SecateurError:
    """What to raise where transformers takes the configuration but cannot load the weights, which
    have `shapes`.

    `built` is the model without its weights, None where not even that can be had.
    """
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModel(
            f"{folder} holds a {config.model_type} model, which is no causal language model."
        )
    if "ignore_mismatched_sizes" in str(error):
        return foreign(folder, (built and other_shape(shapes, built)) or "some have another shape")
    return BadCheckpoint(f"transformers cannot load {folder}: {in_one_line(error)}.")


def foreign(folder: Path, what: str) -> BadCheckpoint:
    """What to raise where weights and configuration do not belong together."""
    return BadCheckpoint(
        f"{folder} does not hold the weights its config.json describes: {what}. Fetch both again "
        "from one place."
    )


def other_shape(shapes: Shapes, model: nn.Module) -> str:
    """Which parameter of a model has another shape in the checkpoint, in words; empty where none
    has.
    """
    for name, parameter in model.named_parameters():
        if shapes.get(name, parameter.shape) != tuple(parameter.shape):
            return f"{name} is {list(shapes[name])}, not {list(parameter.shape)}"
    return ""


def refuse_adapter(folder: Path) -> None:
    """Raise BadCheckpoint for an adapter beside the weights, which transformers would load on top
    of them where peft is installed.
    """
    if (folder / "adapter_config.json").is_file():
        raise BadCheckpoint(
            f"{folder} holds a model and an adapter (adapter_config.json). Move the adapter "
            "elsewhere, or merge it (peft's merge_and_unload) and save the merged model."
        )


def refuse_counts(folder: Path) -> None:
    """Raise BadCheckpoint where config.json counts more layers, heads or experts than any model
    has.

    transformers makes lists of that length before anything is built, so 10^9 would take hours and
    all memory.
    """
    file = folder / "config.json"
    waiting: list[Any] = [json_object(file)]
    while waiting:
        part = waiting.pop()
        for name, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, (dict, list)):
                waiting.append(value)
            elif not isinstance(value, (int, float)) or not value > MOST_PARTS:
                continue
            elif _COUNTS.search(str(name)):
                raise BadCheckpoint(
                    f"{file} says that {name} is {str(value)[:40]}; no model has so many. Fetch it "
                    "again."
                )


@contextmanager
def refusing_more(folder: Path, known: int) -> Iterator[None]:
    """While open, raise BadCheckpoint as soon as a model has many more parameters than a folder has
    tensors.
    """
    registered = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        registered += 1
        if registered > 4 * known + SPARE_TENSORS:
            raise foreign(folder, f"it has {known} tensors, the model more than {registered - 1}")

    with register_module_parameter_registration_hook(count):
        yield


def refuse_larger(folder: Path, shapes: Shapes, model: nn.Module) -> None:
    """Raise BadCheckpoint where a model, built without memory, would take far more of it than the
    checkpoint has.

    What a checkpoint lacks is made up while it is loaded, and refused afterwards; that must not
    fill the memory first.
    """
    stored, wanted = sum(map(prod, shapes.values())), sum(p.numel() for p in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if wanted > 2 * stored + MOST_PARTS or buffers > stored + SPARE_BYTES:
        raise foreign(
            folder, other_shape(shapes, model) or f"it has {stored:,} weights, the model {wanted:,}"
        )


def without_weights(
    checkpoint: Checkpoint, config: Any, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM that a configuration describes, on the meta device; nothing but its shapes can
    be had of it.

    Raises BadCheckpoint where it is far larger than the checkpoint, one of `LOAD_ERRORS` where
    there is none.
    """
    with torch.device("meta"), refusing_more(checkpoint.folder, len(checkpoint.places)):
        model = loader(config).from_config(config, trust_remote_code=trust_remote_code)
    refuse_larger(checkpoint.folder, checkpoint.shapes, model)
    return model


def refuse_foreign_weights(
    checkpoint: Checkpoint, model: nn.Module, stack: str, report: dict[str, Any]
) -> None:
    """Raise BadCheckpoint where weights were missing or there are more blocks; UnsupportedModel for
    odd dtypes.

    `report` is the loading info of `from_pretrained`. Other weights that went unused are let pass:
    old checkpoints hold rotary tables and masks.
    """
    folder, surplus = checkpoint.folder, report["unexpected_keys"]
    head = [name for name in surplus if re.match(r"(score|classifier)\.", name)]
    if head and any(str(name).startswith("lm_head.") for name in report["missing_keys"]):
        raise UnsupportedModel(
            f"{folder} is a classifier or a reward model: it has {head[0]} and no lm_head.weight. "
            "A causal language model was wanted."
        )
    blocks = len(list(model.get_submodule(stack).children()))
    config: Any = model.config
    known = blocks + draft_head_count(config.get_text_config())
    beyond = [name for name in surplus if (block_number(name, stack) or 0) >= known]
    for what, names in (
        ("it lacks", sorted(map(str, report["missing_keys"]))),
        ("it has besides", sorted(beyond)),
    ):
        if names:
            raise foreign(folder, f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    for name, location in checkpoint.places.items():
        if location.dtype not in STORED:
            raise UnsupportedModel(
                f"{name} in {folder} is stored as {location.dtype}, which cannot be used here. "
                "Use the float32, bfloat16 or float16 weights."
            )


def refuse_encoder(model: nn.Module, logits: Tensor) -> None:
    """Raise UnsupportedModel where the last token changes the logits before it.

    `logits` `[2, length, vocabulary]` are those of two rows that differ in their last token.
    Kernels may round otherwise for other rows, and experts be chosen otherwise, so a hundredth of
    the largest logit is let pass.
    """
    one, other = logits[:, :-1].float().nan_to_num()
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise UnsupportedModel(
            f"{type(model).__name__} is no causal language model as its config.json sets it up: a "
            "later token changes the logits of those before it. Encoders, and models that read a "
            "prompt in both directions, have no perplexity, and cannot be used here."
        )


def refuse_non_finite_ends(model: nn.Module, stack: str) -> None:
    """Raise NonFinite where a weight before or after the blocks holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{stack}.") and not parameter.isfinite().all():
            raise NonFinite(f"The weights of {name} hold NaN or Inf. Fetch the checkpoint again.")
