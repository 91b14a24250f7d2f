"""Folders that hold something else than the plain weights of a model, recognised by the names of
their tensors, so that the refusal says what the thing is and what to do.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import BadCheckpoint, SecateurError, UnsupportedModel


class Kind(NamedTuple):
    """What tensors with such names are, in words, and the way out."""

    names: str
    what: str
    way_out: str
    error: type[SecateurError] = BadCheckpoint


_STRIP = "Strip {0!r} from the names and save again: {{n.removeprefix({0!r}): t for n, t in …}}."
WRAPPED = {
    "_orig_mod.": "torch.compile wraps a model",
    "module.": "DataParallel wraps a model",
    "_fsdp_wrapped_module.": "FSDP wraps a model",
    "base_model.model.": "peft wraps a model",
}
"""By the prefix of all names: whose it is."""
KINDS = (
    Kind(
        r"\.lora_[AB]\.",
        "the weights of an adapter beside those of its base model",
        "Merge it (peft's merge_and_unload) and save the merged model.",
    ),
    Kind(
        r"\.weight_(orig|mask)$",
        "leftovers of torch.nn.utils.prune: weight_orig and weight_mask in place of weight",
        "Call torch.nn.utils.prune.remove on every pruned module, and save again.",
    ),
    Kind(
        r"\.parametrizations\.\w+\.original",
        "leftovers of torch.nn.utils.parametrize",
        "Call torch.nn.utils.parametrize.remove_parametrizations, and save again.",
    ),
    Kind(
        r"\.weight_scale(_inv)?$",
        "quantised weights with their scales, and config.json does not say of which kind",
        "Fetch config.json again, or name the unquantised model instead.",
        UnsupportedModel,
    ),
)
"""By a part of some name; the first that fits is said."""


def refuse_other_kinds(source: Checkpoint) -> None:
    """Raise BadCheckpoint or UnsupportedModel where the tensors of a checkpoint are not the plain
    weights of a model.
    """
    names = sorted(source.places)
    for prefix, whose in WRAPPED.items():
        if names and all(name.startswith(prefix) for name in names):
            raise BadCheckpoint(
                f"The tensors of {source.folder} are named {prefix}…, as {whose}. "
                f"{_STRIP.format(prefix)}"
            )
    for kind in KINDS:
        if name := next((name for name in names if re.search(kind.names, name)), None):
            raise kind.error(f"{source.folder} holds {kind.what} ({name}). {kind.way_out}")
    if empty := next((name for name, place in source.places.items() if 0 in place.shape), None):
        raise BadCheckpoint(
            f"{empty} in {source.folder} is empty, as DeepSpeed's ZeRO-3 saves what lies on other "
            "devices. Gather the weights: python zero_to_fp32.py, or "
            "stage3_gather_16bit_weights_on_model_save."
        )
