"""compressed-tensors with values of few bits: what vLLM and transformers load without unpacking.

Each weight matrix `<module>.weight` of the blocks becomes parts, by the format that its grid has:

    pack-quantized        int8, int4, int3, int2
        weight_packed         int32 [out, ⌈in · bits / 32⌉]: codes one after another, low bits first
        weight_zero_point     int32 [⌈out · bits / 32⌉, groups], of an asymmetric grid alone
        weight_shape          int64 [2]
    float-quantized       fp8: weight float8_e4m3fn [out, in]
    nvfp4-pack-quantized  weight_packed uint8 [out, in/2], the even input in the low nibble;
                          weight_global_scale float32 [1], by which scales are divided
    mxfp4-pack-quantized  the same without a factor for the matrix

and `weight_scale` [out, groups], in the checkpoint's dtype, in e4m3 for NVFP4, and as an exponent +
127 for MXFP4. config.json says it as compressed-tensors 0.20.1 does, which writes the same bytes of
the same codes. Activations stay as they are. The factor of NVFP4 is a power of two, so that nothing
is lost by it, and one for matrices that vLLM joins. Whatever is no weight matrix of a block stays.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, Checkpoint
from secateur.deployment.formats.base import Format, refuse_non_finite, write_shards
from secateur.deployment.formats.codes import (
    Coded,
    codes_of,
    e2m1_codes,
    exponents,
    held_in,
    left_out,
    rounding_note,
    values_of,
    with_scales,
)
from secateur.errors import BadCheckpoint, BadPattern, UnsupportedModel
from secateur.methods.values import AS_STORED, GRIDS, Codes, Values, parse_values
from secateur.models.stored import Stored, stored_matrices
from secateur.system.json_files import read_json, write_json

VERSION = "0.20.1"
"""The version of compressed-tensors that is written as."""
FORMAT_OF = dict.fromkeys(("int8", "int4", "int3", "int2"), "pack-quantized") | {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""The library's format of every grid."""
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Neighbours that vLLM makes one matrix of, which has one global scale."""
HIGHEST_E4M3, LOWEST_E4M3 = 448.0, 2.0**-9


def write(
    source: Checkpoint, folder: Path, *, values: str | None = None, trust_remote_code: bool = False
) -> str | None:
    """Put packed shards, their index and the changed config.json into `folder`.

    `values` are those that `parse_values` reads, and by default those that the checkpoint was
    pruned with. Gives a sentence where matrices had to be rounded. Raises BadPattern where groups
    do not divide the inputs, NonFinite for NaN or Inf, BadCheckpoint and UnsupportedModel for what
    the format has no place for, DiskFull and OutputRefused.
    """
    wanted = _wanted(source.folder, values)
    stored, _ = stored_matrices(source, trust_remote_code=trust_remote_code)
    matrices = _matrices(source, stored, wanted)
    may_stay = {f"{module}.weight" for module in left_out(source.folder)}
    for name in matrices:
        if name not in may_stay:
            wanted.check(_shape(source, name), name.removesuffix(".weight"), can_skip=False)
    packed, rounded = set[str](), list[str]()

    def parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in matrices:
            return {name: tensor}
        module = name.removesuffix(".weight")
        refuse_non_finite(name, tensor)
        divided = not (wanted.group and tensor.shape[1] % wanted.group)
        coded = codes_of(tensor, wanted) if divided else None
        if coded is None or (coded.rounded and name in may_stay):
            return {name: tensor}
        factor = _global_scale(source, name, matrices) if wanted.name == "nvfp4" else 1.0
        made, was_rounded = _packed(coded, tensor, wanted, factor)
        packed.add(name)
        rounded.extend([module] * was_rounded)
        return {f"{module}.{part}": one for part, one in made.items()}

    write_shards(source, folder, parts)
    if not packed:
        raise UnsupportedModel(f"Every matrix of {source.folder} was left out. Keep it as it is.")
    config = read_json(folder / "config.json")
    config["quantization_config"] = settings(wanted, _ignored(source, packed))
    write_json(folder / "config.json", config, 2)
    return rounding_note(wanted, rounded, len(packed))


def _wanted(folder: Path, text: str | None) -> Values:
    """The values to write. Raises BadPattern where there are none."""
    values = values_of(folder) if text is None else parse_values(text)
    if values is None:
        why = "has no values in its record" if text is None else f"cannot be packed '{AS_STORED}'"
        raise BadPattern(
            f"{folder} {why}; compressed-tensors stores few bits. "
            f"Say which with --values: {', '.join(GRIDS)}, or as 'int4 of group 64'."
        )
    return values


def _matrices(source: Checkpoint, stored: dict[str, Stored], values: Values) -> dict[str, Stored]:
    """The weight matrices by name. Raises UnsupportedModel, BadCheckpoint for what has no place."""
    matrices: dict[str, Stored] = {}
    for name, matrix in stored.items():
        place = source.places[name]
        if matrix.expert and len(place.shape) > 2:
            raise UnsupportedModel(
                f"{name} holds all experts of a block in one tensor {list(place.shape)}, which "
                "compressed-tensors has no format for. Export it as 'packed', or keep it dense."
            )
        if matrix.expert and (values.asymmetric or values.name == "nvfp4"):
            raise UnsupportedModel(
                f"{name} is of an expert, and transformers loses what {values} needs there besides "
                "scales: zero points and global scales. Say --values 'int4 of group 32' or 'mxfp4'."
            )
        if matrix.transposed or len(place.shape) != 2 or not name.endswith(".weight"):
            raise UnsupportedModel(
                f"{name} lies [inputs, outputs] on disk or is no linear layer, and "
                "compressed-tensors packs linear layers [outputs, inputs]. Keep it dense."
            )
        if place.dtype not in FLOATS:
            raise BadCheckpoint(
                f"{name} is stored as {place.dtype}; floats of 16 bits or more were wanted."
            )
        matrices[name] = matrix
    if not matrices:
        raise UnsupportedModel(f"{source.folder} has no linear layer to store as {values}.")
    return matrices


def _shape(source: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = source.places[name].shape
    return rows, columns


def _packed(
    coded: Coded, weight: Tensor, values: Values, factor: float
) -> tuple[dict[str, Tensor], bool]:
    """The parts of a matrix by their names in its module, and whether it was rounded."""
    if values.name == "nvfp4":
        return _nvfp4(coded, weight, values, factor)
    if values.name == "mxfp4":
        levels, scales, _ = coded.codes
        return {"weight_packed": pairs(levels), "weight_scale": exponents(scales)}, coded.rounded
    coded = with_scales(coded, weight, values, held_in(coded.codes.scales, weight.dtype))
    scales = coded.codes.scales.to(weight.dtype)
    if values.name == "fp8":
        levels = coded.codes.levels.to(torch.float8_e4m3fn)
        return {"weight": levels, "weight_scale": scales}, coded.rounded
    parts = integers(coded.codes, values) | {"weight_scale": scales}
    return parts, coded.rounded


def integers(codes: Codes, values: Values) -> dict[str, Tensor]:
    """The parts of a matrix of integers but for its scales."""
    bits, zero_points = values.grid.bits, codes.zero_points
    groups = codes.levels.unflatten(1, (zero_points.shape[1], -1)) + zero_points[..., None]
    parts = {
        "weight_packed": words(groups.flatten(1), bits),
        "weight_shape": torch.tensor(codes.levels.shape),
    }
    if values.asymmetric:
        parts["weight_zero_point"] = words(zero_points.T, bits).T.contiguous()
    return parts


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, columns]` of so many bits in int32 `[rows, ⌈columns · bits / 32⌉]`, the first
    in the lowest bits; one may go over the end of a word.
    """
    rows, columns = codes.shape
    runs = -(-columns // 32)
    padded = torch.zeros(rows, runs * 32, dtype=torch.int64)
    padded[:, :columns] = codes
    run = padded.unflatten(1, (runs, 32))  # [rows, runs, 32], which are `bits` words
    filled = torch.zeros(rows, runs, bits, dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        filled[..., word] |= (run[..., place] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            filled[..., word + 1] |= run[..., place] >> (32 - shift)
    signed = filled - ((filled >> 31) << 32)
    return signed.flatten(1)[:, : -(-columns * bits // 32)].to(torch.int32).contiguous()


def pairs(levels: Tensor) -> Tensor:
    """Levels of e2m1 `[out, in]`, two a byte, the first in the low half: uint8 `[out, in/2]`."""
    codes = e2m1_codes(levels)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _nvfp4(
    coded: Coded, weight: Tensor, values: Values, factor: float
) -> tuple[dict[str, Tensor], bool]:
    """The parts of a matrix whose scales are stored times `factor`, and whether it was rounded."""
    scales = (coded.codes.scales * factor).clamp(LOWEST_E4M3, HIGHEST_E4M3)
    stored = scales.to(torch.float8_e4m3fn)
    coded = with_scales(coded, weight, values, stored.float() / factor)
    return {
        "weight_packed": pairs(coded.codes.levels),
        "weight_scale": stored,
        "weight_global_scale": torch.tensor([factor]),
    }, coded.rounded


def _global_scale(source: Checkpoint, name: str, matrices: dict[str, Stored]) -> float:
    """The largest power of two with which the scales of a matrix, and of those that are joined to
    it, are no more than e4m3 can hold.

    The largest weight of a group is 4 or 6 scales: with any other, doubled levels fit as well.
    """
    parent, _, own = name.removesuffix(".weight").rpartition(".")
    together = next((names for names in JOINED if own in names), (own,))
    joined = (f"{parent}.{each}.weight" for each in together)
    present = [each for each in joined if each in matrices]
    largest = max(float(source.tensor(each).abs().max()) for each in present) / 4
    return 2.0 ** math.floor(math.log2(HIGHEST_E4M3 / largest)) if largest else 1.0


def _ignored(source: Checkpoint, packed: set[str]) -> list[str]:
    """The linear layers that are not packed: the head, routers and whatever was left out."""
    names = (name for name, place in source.places.items() if len(place.shape) == 2)
    dense = {name for name in names if name.endswith(".weight") and name not in packed}
    modules = {name.removesuffix(".weight") for name in dense}
    looked_up = ("embed", "wte", "wpe")
    left = {one for one in modules if not any(word in one.split(".")[-1] for word in looked_up)}
    return ["lm_head", *sorted(left - {"lm_head"})]


def settings(values: Values, ignored: list[str]) -> dict[str, Any]:
    """What config.json says under `quantization_config`."""
    name = FORMAT_OF[values.name]
    weights: dict[str, Any] = {
        "num_bits": values.grid.bits,
        "type": "float" if values.grid.levels.share else "int",
        "symmetric": not values.asymmetric,
        "group_size": values.group,
        "strategy": "channel" if values.group is None else "group",
        "dynamic": False,
    }
    if values.name == "nvfp4":
        weights |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    elif values.name == "mxfp4":
        weights["scale_dtype"] = "torch.uint8"
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": name,
    }
    return {
        "version": VERSION,
        "quant_method": "compressed-tensors",
        "transform_config": {},
        "config_groups": {"group_0": scheme},
        "kv_cache_scheme": None,
        "format": name,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ignored,
        "moe_sparsity_config": None,
    }


compressed_tensors = Format(
    write,
    "transformers with compressed-tensors 0.20.1, vLLM",
    options=frozenset({"values", "trust_remote_code"}),
    packages=("compressed-tensors",),
)
