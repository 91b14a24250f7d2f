"""Sparse-24-bitmask and sparse-bitmask: a bit for every weight, and the weights that are not zero.

compressed-tensors wrote both until 0.14.0.1 (2026-03); 0.15.0 dropped the code, so what was
published in them cannot be loaded today. Here they are read again, and written byte for byte as
that version did, as an archive: 2:4 or half the weights of a 16-bit model take 9/16 of their bytes.
Nothing of this makes a model faster.

A matrix `<module>.weight` becomes
    compressed    the kept values, row by row: [out, in/2], or [kept] in sparse-bitmask
    bitmask       uint8 [out, ceil(in/8)]: bit j of byte i says whether input 8i + j is kept
    shape         int64: [2, 1], or [2] in sparse-bitmask
    row_offsets   int64 [out], only in sparse-bitmask: where a row begins in `compressed`

Only weight matrices that lie [out, in] are packed; everything else stays as it is. Until 0.8
sparse-bitmask packed every tensor, vectors too, and put the parts behind the whole name,
`<module>.weight.compressed`; that is read as well. Quantised checkpoints, which came in these
formats too, are refused: unpacked, they would not be dense models.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, Checkpoint, open_checkpoint
from secateur.checkpoints.quantised.bitmask import (
    ANY_BITMASK,
    PARTS,
    TWO_OF_FOUR_BITMASK,
    Bitmask,
    dense_names,
    row_offsets,
    unpacked,
)
from secateur.deployment.formats.base import Format, refuse_odd_values, write_shards
from secateur.errors import BadCheckpoint, BadPattern, UnsupportedModel
from secateur.methods.patterns import TWO_OF_FOUR
from secateur.models.stored import stored_matrices
from secateur.system.json_files import json_object, read_json, write_json
from secateur.system.tensors import count_zeros

CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""Where config.json names the format, in 0.14, in 0.5 and in 0.3; a dense one has none of them."""

_VERSION = "0.14.0.1"
_PADDING = {0b0000: 0b1100, 0b0001: 0b0101, 0b0010: 0b1010, 0b0100: 0b1100, 0b1000: 0b1100}
"""Which two of four are stored where fewer are not zero, bit j for input j; as torch.topk."""


class _Layout(NamedTuple):
    """What differs between the two; `keep(name, weight)` is the mask [out, in] of what stays."""

    stored: Bitmask
    structure: str
    keep: Callable[[str, Tensor], Tensor]


def _two_of_four(name: str, weight: Tensor) -> Tensor:
    """Two of every four inputs, all that are not zero among them. Raises BadPattern."""
    if weight.shape[1] % 4:
        raise BadPattern(
            f"2:4 needs inputs in fours; {name} has {weight.shape[1]}. "
            "Write sparse-bitmask, which takes any number."
        )
    groups = (weight != 0).unflatten(1, (-1, 4))  # [out, in/4, 4]
    if crowded := int(TWO_OF_FOUR.crowded(weight).sum()):
        raise BadPattern(
            f"{name} is not 2:4: {crowded} of its {groups[..., 0].numel()} groups of four inputs "
            "hold more than two weights. Prune it with '2:4', or write sparse-bitmask."
        )
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
    padded = torch.arange(16, dtype=torch.uint8)
    for few, two in _PADDING.items():
        padded[few] = two
    chosen = padded[(groups * bits).sum(-1)]  # [out, in/4], a bit for each of the four
    return ((chosen.unsqueeze(-1) & bits) != 0).flatten(1)


_TWO_OF_FOUR = _Layout(TWO_OF_FOUR_BITMASK, "2:4", _two_of_four)
_ANY = _Layout(ANY_BITMASK, "unstructured", lambda _, weight: weight != 0)


def _write(source: Checkpoint, folder: Path, *, layout: _Layout) -> None:
    """Put packed shards, their index and the changed config.json into `folder`.

    Raises BadPattern where a matrix is not 2:4 and must be, NonFinite for NaN or Inf, BadCheckpoint
    for -0.0 or weights that are no floats, UnsupportedModel where there is nothing to pack,
    DiskFull and OutputRefused.
    """
    stored, _ = stored_matrices(source)
    in_place = (name for name, matrix in stored.items() if not matrix.transposed)
    chosen = {name for name in in_place if _is_matrix(name, source)}
    if not chosen:
        raise UnsupportedModel(
            f"{source.folder} has no linear layer that lies [outputs, inputs] on disk, "
            f"so {layout.stored.name} would pack nothing. Keep it as it is."
        )
    zeros = total = 0

    def parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
        nonlocal zeros, total
        zeros += count_zeros(tensor)
        total += tensor.numel()
        if name in chosen:
            return _packed(name.removesuffix(".weight"), tensor, layout)
        return {name: tensor}

    write_shards(source, folder, parts)
    config = read_json(folder / "config.json")
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "transform_config": {},
        "sparsity_config": {
            "format": layout.stored.name,
            "sparsity_structure": layout.structure,
            "global_sparsity": zeros / total,
            "targets": ["Linear"],
            "ignore": _left_dense(source, chosen),
            "registry_requires_subclass": False,
        },
    }
    write_json(folder / "config.json", config, 2)


def _is_matrix(name: str, source: Checkpoint) -> bool:
    return name.endswith(".weight") and len(source.places[name].shape) == 2


def _left_dense(source: Checkpoint, chosen: set[str]) -> list[str]:
    """What a loader must not take for packed: the head, and other matrices of the blocks."""
    stacks = tuple({re.split(r"\.\d+\.", name)[0] + "." for name in chosen})
    names = (name for name in source.places.keys() - chosen if name.startswith(stacks))
    matrices = (name.removesuffix(".weight") for name in names if _is_matrix(name, source))
    return ["lm_head", *sorted(matrices)]


def _packed(module: str, weight: Tensor, layout: _Layout) -> dict[str, Tensor]:
    """The parts that stand for a weight [out, in], by their names in the checkpoint."""
    if weight.dtype not in FLOATS.values():
        raise BadCheckpoint(
            f"{module} is stored as {weight.dtype}; floats of 16 bits or more were wanted."
        )
    refuse_odd_values(module, weight, layout.stored.name)
    kept = layout.keep(module, weight)
    parts = {
        "shape": torch.tensor(weight.shape),
        "compressed": weight.masked_select(kept),
        "bitmask": torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little")),
    }
    if layout.stored.halves:
        parts["shape"] = parts["shape"].reshape(2, 1)
        parts["compressed"] = parts["compressed"].reshape(weight.shape[0], weight.shape[1] // 2)
    else:
        parts["row_offsets"] = row_offsets(kept)
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _config(folder: Path) -> dict[str, Any]:
    """config.json, empty where there is none that can be read."""
    try:
        return json_object(folder / "config.json")
    except (OSError, BadCheckpoint):
        return {}


def _holds(folder: Path, *, layout: _Layout) -> bool:
    """Whether config.json names the format, in any of the places it once had."""
    config = _config(folder)
    outer = [config, *(config.get(key) for key in CONFIG_KEYS[:2])]
    inner = [entry.get("sparsity_config") for entry in outer if isinstance(entry, dict)]
    names = [str(entry.get("format")) for entry in inner if isinstance(entry, dict)]
    return layout.stored.name in [name.replace("_", "-") for name in names]


def _read(folder: Path, *, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    """The dense checkpoint's tensors by name, in the order of the shards. Raises BadCheckpoint."""
    if not _holds(folder, layout=layout):
        raise BadCheckpoint(
            f"{folder} is not in {layout.stored.name}: its config.json names no such "
            "sparsity_config."
        )
    for key in CONFIG_KEYS[:2]:
        entry = _config(folder).get(key)
        if isinstance(entry, dict) and entry.get("config_groups"):
            raise BadCheckpoint(
                f"{folder} is quantised as well ({key}.config_groups in config.json); weights that "
                "are only sparse were wanted. Take the model that it was made from."
            )
    checkpoint = open_checkpoint(folder)
    dense = dense_names(checkpoint, layout.stored)
    for name in checkpoint.places:
        base, _, part = name.rpartition(".")
        if base not in dense or part not in PARTS:
            yield name, checkpoint.tensor(name)
        elif part == "compressed":
            yield dense[base], unpacked(checkpoint, base, layout.stored)


def _format(layout: _Layout, loaded_by: str) -> Format:
    holds, read = partial(_holds, layout=layout), partial(_read, layout=layout)
    write, packages = partial(_write, layout=layout), ("compressed-tensors",)
    return Format(write, loaded_by, holds=holds, read=read, foreign=CONFIG_KEYS, packages=packages)


sparse_24_bitmask = _format(
    _TWO_OF_FOUR,
    "vLLM 0.8 to 0.18 on Hopper, outputs in eights; "
    "transformers 4.57 with compressed-tensors 0.14; no current loader",
)
sparse_bitmask = _format(
    _ANY, "compressed-tensors up to 0.14.0.1, tensor by tensor; no current loader"
)
