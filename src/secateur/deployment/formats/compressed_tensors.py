"""Sparse-24-bitmask and sparse-bitmask: checkpoints that keep a bit for every weight and store what
is not zero.

compressed-tensors wrote both until 0.14.0.1 (2026-03); 0.15.0 dropped the code, so what was
published in them cannot be loaded today. Here they are read again, and written byte for byte as
that version did, as an archive: 2:4 or half the weights of a 16-bit model take 9/16 of their bytes.
Nothing of this makes a model faster.

A matrix `<module>.weight` becomes
    compressed    the kept values, row by row: [out, in/2], or [kept] in sparse-bitmask
    bitmask       uint8 [out, ceil(in/8)]: bit j of byte i says whether input 8i + j is kept
    shape         int64: [2, 1], or [2] in sparse-bitmask
    row_offsets   int64 [out], only in sparse-bitmask: where a row begins in `compressed`

Only sites that lie [out, in] are packed; everything else stays as it is. Until 0.8 sparse-bitmask
packed every tensor, vectors too, and put the parts behind the whole name,
`<module>.weight.compressed`; that is read as well. Quantised checkpoints, which came in these
formats too, are refused: unpacked, they would not be dense models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, INDEX, Checkpoint, TensorLocation, open_checkpoint
from secateur.deployment.formats.base import Format, refuse_odd_values, save
from secateur.errors import BadCheckpoint, BadPattern, UnsupportedModel
from secateur.methods.patterns import TWO_OF_FOUR
from secateur.models.stored import stored_matrices
from secateur.system.json_files import read_json, write_json
from secateur.system.tensors import count_zeros

CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""Where config.json names the format: in 0.14, in 0.5 and in 0.3. A dense checkpoint has none of
them.
"""

_VERSION = "0.14.0.1"
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_PADDING = {0b0000: 0b1100, 0b0001: 0b0101, 0b0010: 0b1010, 0b0100: 0b1100, 0b1000: 0b1100}
"""Which two of four are stored where fewer are not zero, bit j for input j: the choice of
torch.topk among equals.
"""


class _Layout(NamedTuple):
    """What differs between the two. `keep(site, weight)` is the mask [out, in] of what is stored,
    half or any share.
    """

    name: str
    structure: str
    halves: bool
    parts: tuple[str, ...]
    keep: Callable[[str, Tensor], Tensor]


def _two_of_four(site: str, weight: Tensor) -> Tensor:
    """Exactly two of every four consecutive inputs, all that are not zero among them. Raises
    BadPattern.
    """
    if weight.shape[1] % 4:
        raise BadPattern(
            f"2:4 needs inputs in fours; {site} has {weight.shape[1]}. Write sparse-bitmask, which takes any number."
        )
    groups = (weight != 0).unflatten(1, (-1, 4))  # [out, in/4, 4]
    if crowded := int(TWO_OF_FOUR.crowded(weight).sum()):
        raise BadPattern(
            f"{site} is not 2:4: {crowded} of its {groups[..., 0].numel()} groups of four inputs hold more than two "
            "weights. Prune it with '2:4', or write sparse-bitmask."
        )
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
    padded = torch.arange(16, dtype=torch.uint8)
    for few, two in _PADDING.items():
        padded[few] = two
    chosen = padded[(groups * bits).sum(-1)]  # [out, in/4], a bit for each of the four
    return ((chosen.unsqueeze(-1) & bits) != 0).flatten(1)


_TWO_OF_FOUR = _Layout("sparse-24-bitmask", "2:4", True, _PARTS[:3], _two_of_four)
_ANY = _Layout("sparse-bitmask", "unstructured", False, _PARTS, lambda site, weight: weight != 0)


def _write(source: Checkpoint, folder: Path, *, layout: _Layout) -> None:
    """Put the packed shards, their index and the changed config.json into `folder`, a shard at a
    time.

    Raises BadPattern where a site is not 2:4 and must be, NonFinite for NaN or Inf, BadCheckpoint
    for -0.0 or weights that are no floats, UnsupportedModel where there is nothing to pack,
    DiskFull and OutputRefused.
    """
    stored, _ = stored_matrices(source)
    chosen = {
        name for name, held in stored.items() if not held.transposed and _is_matrix(name, source)
    }
    if not chosen:
        raise UnsupportedModel(
            f"{source.folder} has no linear layer that lies [outputs, inputs] on disk, so {layout.name} would pack "
            "nothing. Keep it as it is."
        )
    zeros = total = size = 0
    where: dict[str, str] = {}
    for shard in source.shards:
        tensors: dict[str, Tensor] = {}
        for name in (name for name, place in source.places.items() if place.shard == shard):
            tensor = source.tensor(name)
            zeros += count_zeros(tensor)
            total += tensor.numel()
            tensors |= (
                _packed(name.removesuffix(".weight"), tensor, layout)
                if name in chosen
                else {name: tensor}
            )
        save(tensors, folder / shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
        where |= dict.fromkeys(tensors, shard)
    if (source.folder / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index, 2)
    config = read_json(folder / "config.json")
    config["quantization_config"] = _description(layout, zeros / total, _left_dense(source, chosen))
    write_json(folder / "config.json", config, 2)


def _is_matrix(name: str, source: Checkpoint) -> bool:
    return name.endswith(".weight") and len(source.places[name].shape) == 2


def _left_dense(source: Checkpoint, chosen: set[str]) -> list[str]:
    """The modules that a loader must not take for packed: the head, and matrices of the blocks that
    are no sites.
    """
    stacks = tuple({re.split(r"\.\d+\.", name)[0] + "." for name in chosen})
    names = (name for name in source.places if name.startswith(stacks) and _is_matrix(name, source))
    return [
        "lm_head",
        *sorted(name.removesuffix(".weight") for name in names if name not in chosen),
    ]


def _description(layout: _Layout, sparsity: float, ignore: list[str]) -> dict[str, Any]:
    """What config.json says of the format. `sparsity` is the share of zeros among all weights of
    the model.
    """
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "transform_config": {},
        "sparsity_config": {
            "format": layout.name,
            "sparsity_structure": layout.structure,
            "global_sparsity": sparsity,
            "targets": ["Linear"],
            "ignore": ignore,
            "registry_requires_subclass": False,
        },
    }


def _packed(site: str, weight: Tensor, layout: _Layout) -> dict[str, Tensor]:
    """The parts that stand for a weight [out, in], by their names in the checkpoint."""
    if weight.dtype not in FLOATS.values():
        raise BadCheckpoint(
            f"{site} is stored as {weight.dtype}; floats of 16 bits or more were wanted."
        )
    refuse_odd_values(site, weight, layout.name)
    kept = layout.keep(site, weight)
    parts = {
        "shape": torch.tensor(weight.shape).reshape(2, 1)
        if layout.halves
        else torch.tensor(weight.shape),
        "compressed": weight.masked_select(kept),
        "bitmask": torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little")),
    }
    if layout.halves:
        parts["compressed"] = parts["compressed"].reshape(weight.shape[0], weight.shape[1] // 2)
    else:
        parts["row_offsets"] = _row_offsets(kept)
    return {f"{site}.{part}": tensor for part, tensor in parts.items()}


def _row_offsets(kept: Tensor) -> Tensor:
    """How many are kept in all rows before each: int64 [out], and one zero for a vector."""
    counts = kept.sum(-1)
    return counts.cumsum(0) - counts


def _config(folder: Path) -> dict[str, Any]:
    """config.json, empty where there is none that can be read."""
    try:
        held = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _holds(folder: Path, *, layout: _Layout) -> bool:
    """Whether config.json names the format, in any of the places it once had."""
    config = _config(folder)
    outer = [config, *(config.get(key) for key in CONFIG_KEYS[:2])]
    named = [held.get("sparsity_config") for held in outer if isinstance(held, dict)]
    return any(
        str(held.get("format")).replace("_", "-") == layout.name
        for held in named
        if isinstance(held, dict)
    )


def _read(folder: Path, *, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense checkpoint by name, one at a time, in the order of the shards.
    Raises BadCheckpoint.
    """
    if not _holds(folder, layout=layout):
        raise BadCheckpoint(
            f"{folder} is not in {layout.name}: its config.json names no such sparsity_config."
        )
    for key in CONFIG_KEYS[:2]:
        held = _config(folder).get(key)
        if isinstance(held, dict) and held.get("config_groups"):
            raise BadCheckpoint(
                f"{folder} is quantised as well ({key}.config_groups in config.json); weights that are only sparse "
                "were wanted. Take the model that it was made from."
            )
    checkpoint = open_checkpoint(folder)
    dense = _dense_names(checkpoint, layout)
    for name in checkpoint.places:
        base, _, part = name.rpartition(".")
        if base not in dense or part not in _PARTS:
            yield name, checkpoint.tensor(name)
        elif part == "compressed":
            yield dense[base], _unpacked(checkpoint, base, layout)


def _dense_names(checkpoint: Checkpoint, layout: _Layout) -> dict[str, str]:
    """The dense tensor's name for everything that is packed. Raises BadCheckpoint unless all parts
    are there, once.
    """
    found: dict[str, set[str]] = {}
    for name in checkpoint.places:
        base, _, part = name.rpartition(".")
        if part in _PARTS:
            found.setdefault(base, set()).add(part)
    whole = any(base.endswith(".weight") for base in found)  # as until 0.8
    names = {base: base if whole else f"{base}.weight" for base in found}
    for base, parts in found.items():
        if parts != set(layout.parts):
            raise BadCheckpoint(
                f"{base} is stored as {', '.join(sorted(parts))}; {', '.join(sorted(layout.parts))} were wanted. "
                "A shard may be missing; fetch the folder again."
            )
        if names[base] in checkpoint.places:
            raise BadCheckpoint(
                f"{names[base]} is stored both dense and packed; one of them was wanted."
            )
    return names


def _unpacked(checkpoint: Checkpoint, base: str, layout: _Layout) -> Tensor:
    """The dense tensor of one name. What it takes is bounded by the stored bitmask, never by what
    `shape` claims.
    """
    places = {part: checkpoint.places[f"{base}.{part}"] for part in layout.parts}
    sizes = _sizes(checkpoint, base, layout)
    rows, columns = sizes[:-1], sizes[-1]
    _check_place(base, "bitmask", places["bitmask"], ("U8",), (*rows, -(-columns // 8)))
    stored = (
        (*rows, columns // 2) if layout.halves else places["compressed"].shape[:1]
    )  # how many, the bitmask tells
    _check_place(base, "compressed", places["compressed"], tuple(FLOATS), stored)
    if not layout.halves:
        _check_place(base, "row_offsets", places["row_offsets"], ("I64",), rows)

    bits = np.unpackbits(checkpoint.tensor(f"{base}.bitmask").numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(bits[..., :columns]).bool()  # [*rows, columns]
    values = checkpoint.tensor(f"{base}.compressed").flatten()
    _require(
        not bits[..., columns:].any(), f"{base}.bitmask", f"marks inputs past the last of {columns}"
    )
    marked, given = int(kept.sum()), values.numel()
    _require(marked == given, f"{base}.bitmask", f"marks {marked} weights where {given} are stored")
    if layout.halves:
        twos = bool((kept.reshape(-1, 4).sum(-1) == 2).all())
        _require(twos, f"{base}.bitmask", "does not mark two of every four inputs")
    else:
        offsets = checkpoint.tensor(f"{base}.row_offsets")
        _require(
            torch.equal(offsets, _row_offsets(kept)),
            f"{base}.row_offsets",
            "does not fit the bitmask",
        )
    return torch.zeros(sizes, dtype=values.dtype).masked_scatter_(kept, values)


def _sizes(checkpoint: Checkpoint, base: str, layout: _Layout) -> tuple[int, ...]:
    """The dense shape that is claimed, its dimensions positive: [out, in], or [in] for a vector in
    sparse-bitmask.
    """
    place = checkpoint.places[f"{base}.shape"]
    allowed = ((2, 1), (2,)) if layout.halves else ((2,), (1,))
    _require(
        place.dtype == "I64" and place.shape in allowed,
        f"{base}.shape",
        "is no list of one or two sizes",
    )
    sizes = tuple(checkpoint.tensor(f"{base}.shape").flatten().tolist())
    _require(min(sizes) > 0, f"{base}.shape", f"claims the sizes {sizes}")
    if layout.halves:
        fours = (
            sizes[1] % 2 == 0 and sizes[0] * sizes[1] % 4 == 0
        )  # a group may reach over the end of a row
        _require(fours, f"{base}.shape", f"claims {sizes}, which hold no groups of four")
    return sizes


def _check_place(
    base: str, part: str, place: TensorLocation, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    found, wanted = f"{place.dtype} {list(place.shape)}", f"{' or '.join(dtypes)} {list(shape)}"
    _require(
        place.dtype in dtypes and place.shape == shape,
        f"{base}.{part}",
        f"is stored as {found}, not as {wanted}",
    )


def _require(sound: bool, tensor: str, trouble: str) -> None:
    if not sound:
        raise BadCheckpoint(f"{tensor} {trouble}. The file was cut or altered; fetch it again.")


def _format(layout: _Layout, loaded_by: str) -> Format:
    holds, read = partial(_holds, layout=layout), partial(_read, layout=layout)
    return Format(
        partial(_write, layout=layout), loaded_by, holds=holds, read=read, foreign=CONFIG_KEYS
    )


sparse_24_bitmask = _format(
    _TWO_OF_FOUR,
    "vLLM 0.8 to 0.18 on Hopper, outputs in eights; transformers 4.57 with compressed-tensors 0.14; no current loader",
)
sparse_bitmask = _format(
    _ANY, "compressed-tensors up to 0.14.0.1, tensor by tensor; no current loader"
)
