"""What a recovery refuses before it begins: options, other models, folders that were changed."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.folder import RECORD, Checkpoint
from secateur.checkpoints.record import record_of
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import BadCheckpoint, NonFinite, UnknownName, UnsupportedModel
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.recovery.job import Dense, Pruned, aims_at_dense
from secateur.system.devices import find_dtype
from secateur.system.settings import Training, Trust
from secateur.system.tensors import count_zeros, is_finite
from secateur.system.typed import Number, is_a

WAYS = ("lora", "masked", "distill", "lora+distill", "masked+distill", "blocks")
"""What each trains, and towards what: docs/recovery.md."""
PACKAGES = ("peft", "accelerate")
WORDS = "A model is pruned.\ndef f(x):\n    return x + 1  # Zürich 東京 0123456789"


def check_way(training: Training, dense: str | Path | None) -> None:
    """Raise UnknownName or UnsupportedModel for an unknown way, or one that lacks what it needs."""
    way = training.way
    if way not in WAYS:
        raise UnknownName("way to recover", way, WAYS)
    if aims_at_dense(way) and dense is None:
        raise UnsupportedModel(f"{way} aims at what the dense model says; name it with --dense.")
    if way == "blocks":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UnsupportedModel(
                "blocks recovers in one process; it was started in several. Start it alone."
            )
        if training.accumulate > 1 or training.gradient_checkpointing:
            raise UnsupportedModel(
                "blocks takes a step after each batch, one block at a time; it neither accumulates "
                "nor checkpoints gradients."
            )
        if find_dtype(training.dtype) not in ("auto", "float32"):
            raise UnsupportedModel(
                f"blocks trains in float32; found --dtype {training.dtype}. Leave it out."
            )
    elif absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise UnsupportedModel(
            f"Recovery needs the package {' and '.join(absent)}. Install it: pip install "
            "'secateur[recover]'."
        )


def check_numbers(training: Training, device: torch.device) -> None:
    """Raise UnsupportedModel for an impossible rate or seed, or a GPU that would not be used."""
    if training.rate is not None and not 0 < training.rate < float("inf"):
        raise UnsupportedModel(f"A rate is above 0; found {training.rate}.")
    if not 0 <= training.seed < 2**32:
        raise UnsupportedModel(f"A seed is at least 0 and below 2^32; found {training.seed}.")
    if device.index and "RANK" not in os.environ:
        raise UnsupportedModel(
            f"Training in one process takes the first GPU that it sees; found {device}. Choose "
            f"with CUDA_VISIBLE_DEVICES={device.index}, or use several through torchrun."
        )


def pruning_record(source: Checkpoint) -> dict[str, Any]:
    """What pruning.json says. Raises BadCheckpoint where there is none."""
    record = record_of(source.folder)
    if record is None:
        raise BadCheckpoint(
            f"{source.folder} has no {RECORD}; a folder that 'secateur prune' wrote is wanted."
        )
    if (
        not is_a(list[dict[str, Any]], record.get("recovery", []))
        or not is_a(Number, record.get("sparsity"))
        or record.get("sites") is None
    ):
        raise BadCheckpoint(f"{source.folder / RECORD} is no record of a pruning run. Prune again.")
    return record


def refuse_values(pruned: Pruned, way: str) -> None:
    """Raise UnsupportedModel where a way would train weights off the grid that they are on."""
    values = pruned.record.get("values")
    if values is not None and way != "blocks":
        raise UnsupportedModel(
            f"{pruned.source.folder} was written with --values {values!r}, and {way} trains "
            "weights off that grid. Recover it --with blocks, which keeps them on it, or recover a "
            "model with values as stored, and then prune that to 0% with --values and --keep-zeros."
        )


def refuse_dropout(pruned: Pruned) -> None:
    """Raise BadCheckpoint for a share of dropout, which only training uses, that is none."""
    config = pruned.language_model.text_config
    for name, value in config.to_dict().items():
        share = ("dropout" in name or "pdrop" in name) and type(value) in (int, float)
        if share and not 0 <= value < 1:
            raise BadCheckpoint(
                f"{pruned.source.folder / 'config.json'} has {name} {value}; a share below 1 was "
                "wanted."
            )


def refuse_other_weights(pruned: Pruned) -> None:
    """Raise BadCheckpoint for other zeros than pruning.json says, NonFinite for NaN or Inf."""
    source, record, language_model = pruned
    masked = record.get("kind") != "structured"
    recorded = {
        entry["site"]: entry["sparsity"]
        for entry in record["sites"]
        if is_a(Number, entry.get("sparsity"))
    }
    all_zeros = total = 0
    for index, block in enumerate(language_model.blocks):
        for name, matrix in weight_matrices(block).items():
            full = f"{language_model.block_name(index)}.{name}"
            if not is_finite(matrix.weight):
                raise NonFinite(
                    f"The weights of {full} hold NaN or Inf. Mend the model, or prune it again."
                )
            zeros, size = count_zeros(matrix.weight), matrix.weight.numel()
            all_zeros, total = all_zeros + zeros, total + size
            if masked and (full not in recorded or abs(zeros - recorded[full] * size) > 0.5):
                raise BadCheckpoint(
                    f"{full} has {zeros / size:.2%} zeros, and {source.folder / RECORD} says "
                    f"{recorded.get(full)}. The folder was changed after it was pruned; prune "
                    "again."
                )
    sparsity = record["sparsity"]
    if not (abs(all_zeros / total - sparsity) < 1e-6 if masked else 0 <= sparsity <= 1):
        raise BadCheckpoint(
            f"The weight matrices of {source.folder} have {all_zeros / total:.2%} zeros, and its "
            f"{RECORD} says {sparsity}. The folder was changed after it was pruned; prune again."
        )


def refuse_other_model(pruned: Pruned, dense: Dense, trust: Trust) -> None:
    """Raise UnsupportedModel for a dense model of another architecture, vocabulary or tokenizer.

    A structured result may be carried by another architecture than the dense one, as Llama by
    Mistral.
    """
    folder, other = pruned.source.folder, dense.folder
    ours, theirs = pruned.language_model.model, dense.language_model.model
    structured = pruned.record.get("kind") == "structured"
    if type(ours).__name__ != type(theirs).__name__ and not structured:
        raise UnsupportedModel(
            f"{folder} is a {type(ours).__name__}, {other} a {type(theirs).__name__}. Name the "
            "dense model that was pruned."
        )
    one, two = (model.config.get_text_config() for model in (ours, theirs))
    if (one.hidden_size, one.vocab_size) != (two.hidden_size, two.vocab_size):
        raise UnsupportedModel(
            f"{folder} has width {one.hidden_size} and {one.vocab_size} tokens, {other} "
            f"{two.hidden_size} and {two.vocab_size}. Name the dense model that was pruned."
        )
    first, second = (
        load_tokenizer(place, trust_remote_code=trust.trust_remote_code)
        for place in (folder, other)
    )
    if first.get_vocab() != second.get_vocab() or first.encode(WORDS) != second.encode(WORDS):
        raise UnsupportedModel(
            f"{folder} and {other} have different tokenizers. Name the dense model that was pruned."
        )


def refuse_blocks(pruned: LanguageModel, dense: LanguageModel) -> None:
    """Raise UnsupportedModel where two models differ in more than the weights of their blocks."""
    if len(pruned.blocks) != len(dense.blocks):
        raise UnsupportedModel(
            f"The pruned model has {len(pruned.blocks)} blocks, the dense one {len(dense.blocks)}; "
            "block by block they cannot be matched. Recover with --with distill."
        )
    in_blocks = {id(parameter) for block in dense.blocks for parameter in block.parameters()}
    for name, parameter in dense.model.named_parameters():
        if id(parameter) not in in_blocks and not torch.equal(
            parameter, pruned.model.get_parameter(name)
        ):
            raise UnsupportedModel(
                f"{name} is not that of the dense model, as after a recovery of all weights; block "
                "by block only what is in the blocks is trained. Recover with --with distill."
            )
