"""What is refused while a checkpoint is loaded, and in which words; where nothing is raised, `model` goes on.

transformers loads much that is no causal language model, or not the one that its folder describes: weights that
are missing are made up, those it has no use for are dropped, encoders predict tokens that they have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.checkpoint import open_checkpoint
from secateur.errors import BadCheckpoint, NonFinite, SecateurError, UnsupportedModel, in_one_line

# What transformers raises for a configuration or weights that it cannot take, whatever it is that is wrong.
LOAD_ERRORS = (
    ValueError, LookupError, RuntimeError, OSError, TypeError, AttributeError, ArithmeticError, AssertionError,
    ImportError, StrictDataclassError,
)  # fmt: skip
STORED = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")  # the last four hold positions and masks


def bad_config(folder: Path, error: BaseException) -> SecateurError:
    """What to raise where transformers cannot take the configuration in `folder`."""
    if "trust_remote_code" in str(error):
        return UnsupportedModel(
            f"{folder} needs code of its own (auto_map in config.json), which is not run unless asked for. "
            "Read that code, then add --trust-remote-code."
        )
    return UnsupportedModel(f"{folder / 'config.json'} describes no model that transformers knows: {_said(error)}")


def bad_weights(folder: Path, config: Any, error: BaseException) -> SecateurError:
    """What to raise where transformers takes the configuration but cannot load the weights."""
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModel(f"{folder} holds a {config.model_type} model, which is no causal language model.")
    if "ignore_mismatched_sizes" in str(error):
        return _foreign(folder, _other_shape(folder, config))
    return BadCheckpoint(f"transformers cannot load {folder}: {_said(error)}")


def _said(error: BaseException) -> str:
    return f"{in_one_line(error)}."


def _foreign(folder: Path, what: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{folder} does not hold the weights its config.json describes: {what}. Fetch both again from one place."
    )


def _other_shape(folder: Path, config: Any) -> str:
    places = open_checkpoint(folder).places
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name in places and places[name].shape != tuple(parameter.shape):
            return f"{name} is {list(places[name].shape)}, not {list(parameter.shape)}"
    return "some have another shape"


def refuse_foreign_weights(folder: Path, model: nn.Module, stack: str, report: dict[str, Any]) -> None:
    """Raise BadCheckpoint where weights were missing or there are more blocks; UnsupportedModel for odd dtypes.

    `report` is the loading info of `from_pretrained`. Other weights that went unused are let pass: old checkpoints
    hold rotary tables and masks.
    """
    blocks = len(list(model.get_submodule(stack).children()))
    beyond = [name for name in report["unexpected_keys"] if _block(name, stack) >= blocks]
    for what, names in (("it lacks", sorted(map(str, report["missing_keys"]))), ("it has besides", sorted(beyond))):
        if names:
            raise _foreign(folder, f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    for name, place in open_checkpoint(folder).places.items():
        if place.dtype not in STORED:
            raise UnsupportedModel(
                f"{name} in {folder} is stored as {place.dtype}, which cannot be pruned. "
                "Use the float32, bfloat16 or float16 weights."
            )


def _block(name: str, stack: str) -> int:
    """The number of the block that a weight belongs to, -1 for none."""
    number = name.removeprefix(f"{stack}.").split(".")[0]
    return int(number) if name.startswith(f"{stack}.") and number.isdecimal() else -1


def refuse_encoder(model: nn.Module, logits: Tensor) -> None:
    """Raise UnsupportedModel where the last token changes the logits before it.

    `logits` `[2, length, vocabulary]` are those of two rows that differ in their last token. Kernels may round
    otherwise for other rows, and experts be chosen otherwise, so a hundredth of the largest logit is let pass.
    """
    one, other = logits[:, :-1].float().nan_to_num()
    if (one - other).abs().max() > 0.01 * one.abs().max():
        raise UnsupportedModel(
            f"{type(model).__name__} is no causal language model as its config.json sets it up: a later token changes "
            "the logits of those before it. Encoders have no perplexity, and cannot be pruned here."
        )


def refuse_non_finite_ends(model: nn.Module, stack: str) -> None:
    """Raise NonFinite where a weight before or after the blocks holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{stack}.") and not parameter.isfinite().all():
            raise NonFinite(f"The weights of {name} hold NaN or Inf. Fetch the checkpoint again.")
