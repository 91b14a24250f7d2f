"""What a recovery refuses before it begins: another way, another model, a folder that is not what
its record says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.folder import RECORD, Checkpoint
from secateur.checkpoints.record import record_of
from secateur.data.windows import load_tokenizer
from secateur.errors import BadCheckpoint, NonFinite, UnknownName, UnsupportedModel
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.system.devices import find_dtype
from secateur.system.json_files import fits
from secateur.system.tensors import count_zeros, is_finite

WAYS = {
    "lora": "adapters on every linear layer, merged under the mask",
    "masked": "all weights, what is zero stays zero",
    "distill": "all weights, towards what the dense model says next; the same as masked+distill",
    "lora+distill": "adapters, towards what the dense model says next",
    "masked+distill": "all weights, towards what the dense model says next",
    "blocks": "the linear layers of one block at a time, towards what the dense block makes of the same text",
}
PACKAGES = ("peft", "accelerate")
WORDS = "A model is pruned.\ndef f(x):\n    return x + 1  # Zürich 東京 0123456789"


def aims_at_dense(way: str) -> bool:
    """Whether a way aims at what the dense model does."""
    return way.endswith("distill") or way == "blocks"


def check_way(
    way: str,
    dense: str | Path | None,
    *,
    accumulate: int = 1,
    checkpointing: bool = False,
    dtype: str = "auto",
) -> None:
    """Raise UnknownName or UnsupportedModel for a way that is not there, or that lacks what it
    needs.
    """
    if way not in WAYS:
        raise UnknownName("way to recover", way, WAYS)
    if aims_at_dense(way) and dense is None:
        raise UnsupportedModel(f"{way} aims at what the dense model says; name it with --dense.")
    if way == "blocks":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UnsupportedModel(
                "blocks recovers in one process; it was started in several. Start it alone."
            )
        if accumulate > 1 or checkpointing:
            raise UnsupportedModel(
                "blocks takes a step after each batch, one block at a time; it neither accumulates "
                "nor checkpoints gradients."
            )
        if find_dtype(dtype) not in ("auto", "float32"):
            raise UnsupportedModel(
                f"blocks trains in float32; found --dtype {dtype}. Leave it out."
            )
        return
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise UnsupportedModel(
            f"Recovery needs the package {' and '.join(absent)}. Install it: pip install 'secateur[recover]'."
        )


def check_numbers(rate: float | None, seed: int, device: torch.device) -> None:
    """Raise UnsupportedModel for a rate or a seed that training cannot have, or a GPU that it would
    not use.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise UnsupportedModel(f"A rate is above 0; found {rate}.")
    if not 0 <= seed < 2**32:
        raise UnsupportedModel(f"A seed is at least 0 and below 2^32; found {seed}.")
    if device.index and "RANK" not in os.environ:
        raise UnsupportedModel(
            f"Training in one process takes the first GPU that it sees; found {device}. Choose with "
            f"CUDA_VISIBLE_DEVICES={device.index}, or use several through torchrun."
        )


def pruning_record(source: Checkpoint) -> dict[str, Any]:
    """What pruning.json says. Raises BadCheckpoint where there is none."""
    record = record_of(source.folder)
    if record is None:
        raise BadCheckpoint(
            f"{source.folder} has no {RECORD}; a folder that 'secateur prune' wrote is wanted."
        )
    earlier = fits(record.get("recovery", []), list[dict[str, Any]])
    if (
        not earlier
        or not fits(record.get("sparsity"), float)
        or not fits(record.get("sites"), list[Any])
    ):
        raise BadCheckpoint(f"{source.folder / RECORD} is no record of a pruning run. Prune again.")
    return record


def refuse_dropout(source: Checkpoint, language_model: LanguageModel) -> None:
    """Raise BadCheckpoint for a share of dropout, which only training uses, that is none."""
    for name, value in language_model.model.config.get_text_config().to_dict().items():
        share = ("dropout" in name or "pdrop" in name) and type(value) in (int, float)
        if share and not 0 <= value < 1:
            raise BadCheckpoint(
                f"{source.folder / 'config.json'} has {name} {value}; a share below 1 was wanted."
            )


def refuse_other_weights(
    source: Checkpoint, language_model: LanguageModel, record: Mapping[str, Any]
) -> None:
    """Raise BadCheckpoint where the zeros of a site are not as many as pruning.json says, NonFinite
    for NaN or Inf.
    """
    masked = record.get("kind") != "structured"
    said = {
        site["site"]: site["sparsity"]
        for site in record["sites"]
        if fits(site, dict[str, Any])
        and isinstance(site.get("site"), str)
        and fits(site.get("sparsity"), float)
    }
    zeros = total = 0
    for index, block in enumerate(language_model.blocks):
        for name, site in weight_matrices(block).items():
            full = f"{language_model.block_name(index)}.{name}"
            if not is_finite(site.weight):
                raise NonFinite(
                    f"The weights of {full} hold NaN or Inf. Mend the model, or prune it again."
                )
            found, size = count_zeros(site.weight), site.weight.numel()
            zeros, total = zeros + found, total + size
            if masked and (full not in said or abs(found - said[full] * size) > 0.5):
                raise BadCheckpoint(
                    f"{full} has {found / size:.2%} zeros, and {source.folder / RECORD} says {said.get(full)}. The "
                    "folder was changed after it was pruned; prune again."
                )
    if not (
        abs(zeros / total - record["sparsity"]) < 1e-6 if masked else 0 <= record["sparsity"] <= 1
    ):
        raise BadCheckpoint(
            f"The sites of {source.folder} have {zeros / total:.2%} zeros, and its {RECORD} says {record['sparsity']}. "
            "The folder was changed after it was pruned; prune again."
        )


def refuse_other_model(
    model: LanguageModel,
    dense: LanguageModel,
    folder: Path,
    other: Path,
    *,
    smaller: bool,
    trust_remote_code: bool,
) -> None:
    """Raise UnsupportedModel where the dense model has another architecture, vocabulary or
    tokenizer.

    A `smaller` model may be carried by another architecture than the dense one, as Llama by
    Mistral.
    """
    one, two = (language_model.model.config.get_text_config() for language_model in (model, dense))
    if type(model.model).__name__ != type(dense.model).__name__ and not smaller:
        raise UnsupportedModel(
            f"{folder} is a {type(model.model).__name__}, {other} a {type(dense.model).__name__}. Name the dense model "
            "that was pruned."
        )
    if (one.hidden_size, one.vocab_size) != (two.hidden_size, two.vocab_size):
        raise UnsupportedModel(
            f"{folder} has width {one.hidden_size} and {one.vocab_size} tokens, {other} {two.hidden_size} and "
            f"{two.vocab_size}. Name the dense model that was pruned."
        )
    ours, theirs = (
        load_tokenizer(place, trust_remote_code=trust_remote_code) for place in (folder, other)
    )
    if ours.get_vocab() != theirs.get_vocab() or ours.encode(WORDS) != theirs.encode(WORDS):
        raise UnsupportedModel(
            f"{folder} and {other} have different tokenizers. Name the dense model that was pruned."
        )


def refuse_blocks(model: LanguageModel, dense: LanguageModel) -> None:
    """Raise UnsupportedModel where the blocks of two models do not stand for each other on the same
    hidden states.
    """
    ours, theirs = len(model.blocks), len(dense.blocks)
    if ours != theirs:
        raise UnsupportedModel(
            f"The pruned model has {ours} blocks, the dense one {theirs}; block by block they cannot be matched. "
            "Recover with --with distill."
        )
    blocks = {id(parameter) for block in dense.blocks for parameter in block.parameters()}
    for name, parameter in dense.model.named_parameters():
        if id(parameter) not in blocks and not torch.equal(
            parameter, model.model.get_parameter(name)
        ):
            raise UnsupportedModel(
                f"{name} is not that of the dense model, as after a recovery of all weights; block by block only what "
                "is in the blocks is trained. Recover with --with distill."
            )
