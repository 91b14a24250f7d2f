"""The formats of quantised checkpoints that are read: a new one is a file, and a line here.

Which one a folder is follows from `quant_method` in its config.json, or in the file that the
quantiser wrote beside it, and where neither says it, from the names and dtypes of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from secateur.checkpoints.copied import belonging_files, refuse_links_out
from secateur.checkpoints.folder import INDEX, Checkpoint, is_whole, open_checkpoint
from secateur.checkpoints.quantised import (
    awq,
    bitmask,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    mlx,
    mxfp4,
    nvfp4,
    torchao,
)
from secateur.checkpoints.quantised.base import File, PlainSource
from secateur.checkpoints.quantised.gguf import gguf_source, is_gguf
from secateur.checkpoints.quantised.packed import Decoded, QuantisedFolder, all_tensors
from secateur.checkpoints.quantised.unpack import SOURCE
from secateur.errors import BadCheckpoint, UnsupportedModel
from secateur.system.json_files import json_object


class Format(NamedTuple):
    """A format: whether a folder is in it, and its name in words with what is packed."""

    recognised: Callable[[QuantisedFolder], bool]
    decoded: Callable[[QuantisedFolder], tuple[str, Decoded]]


FORMATS = {
    "mlx": Format(mlx.recognised, mlx.decoded),
    "compressed-tensors": Format(compressed_tensors.recognised, compressed_tensors.decoded),
    "bitmask": Format(bitmask.recognised, bitmask.decoded),
    "nvfp4": Format(nvfp4.recognised, nvfp4.decoded),
    "fp8": Format(fp8.recognised, fp8.decoded),
    "mxfp4": Format(mxfp4.recognised, mxfp4.decoded),
    "bitsandbytes": Format(bitsandbytes.recognised, bitsandbytes.decoded),
    "gptq": Format(gptq.recognised, gptq.decoded),
    "awq": Format(awq.recognised, awq.decoded),
    "torchao": Format(torchao.recognised, torchao.decoded),
    "hqq": Format(hqq.recognised, hqq.decoded),
}
"""In the order in which they are asked."""
METHODS = {*FORMATS, *fp8.METHODS, "auto-round", "modelopt", "modelopt_fp4"}
"""What `quant_method` may be; which of its kinds are read, the tensors say."""
KEYS = ("quantization_config", "compression_config", "sparsity_config", "quantization")
"""Where config.json speaks of quantisation; that of a plain model has none of them."""
BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that quantisers write beside config.json."""


def plain_source(folder: Path) -> PlainSource | None:
    """A quantised folder, or a GGUF file, as the plain checkpoint that it stands for; None where it
    is plain, or has no weights.
    """
    if not is_gguf(folder) and not ((folder / "config.json").is_file() and is_whole(folder)):
        return None
    source = read_headers(folder)
    return source if isinstance(source, PlainSource) else None


def read_headers(folder: Path) -> PlainSource | Checkpoint:
    """The checkpoint in a folder; of a quantised folder, and of a GGUF file, the plain one that it
    stands for.

    Only headers are read. Raises UnsupportedModel for a format that cannot be read, BadCheckpoint
    where the tensors are not what the format wants.
    """
    if is_gguf(folder):
        return gguf_source(folder)
    checkpoint = open_checkpoint(folder)
    config = json_object(folder / "config.json")
    settings = settings_of(folder, config)
    source = QuantisedFolder(checkpoint, config, settings or {})
    name = next((name for name, one in FORMATS.items() if one.recognised(source)), None)
    if name is None:
        if settings is not None:
            raise UnsupportedModel(unreadable(folder, settings))
        return checkpoint
    try:
        words, decoded = FORMATS[name].decoded(source)
        tensors = all_tensors(source, decoded)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"Read as {name}: {error}") from error
    if not any(decoded.values()):
        raise BadCheckpoint(
            f"{folder} is quantised, as its config.json says, and holds no quantised weights. If "
            f"they are plain, delete {_key(config)} from config.json."
        )
    refuse_links_out(folder)
    shards = tuple(folder / shard for shard in checkpoint.shards)
    return PlainSource(words, folder, shards, plain_config(config), tensors, _files(checkpoint))


def settings_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a folder says of its quantisation, in one dictionary; None where it says nothing."""
    for key in KEYS:
        if value := config.get(key):
            nested = {key: value} if key == "sparsity_config" else value
            return nested if isinstance(nested, dict) else {"quant_method": str(value)}
    text = config.get("text_config")
    if isinstance(text, dict) and isinstance(value := text.get("quantization_config"), dict):
        return value
    for name in BESIDE:
        if (folder / name).is_file():
            value = json_object(folder / name)
            if name == "hf_quant_config.json":
                inner = value.get("quantization")
                return {**(inner if isinstance(inner, dict) else {}), "quant_method": "modelopt"}
            return {"quant_method": "awq" if "w_bit" in value else "gptq", **value}
    return None


def _sparse(settings: Mapping[str, Any] | None) -> bool:
    sparse = (settings or {}).get("sparsity_config")
    return isinstance(sparse, dict) and sparse.get("format", "dense") != "dense"


def _key(config: Mapping[str, Any]) -> str:
    return next((key for key in KEYS if config.get(key)), "the words on quantisation")


def refuse_unreadable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel where the name of the method alone says that it cannot be read."""
    quantised_too = _sparse(settings) and settings.get("config_groups")
    if settings.get("quant_method") not in (None, *METHODS) or quantised_too:
        raise UnsupportedModel(unreadable(folder, settings))


def unreadable(folder: Path, settings: Mapping[str, Any]) -> str:
    """What to say of a quantised folder that cannot be read."""
    if _sparse(settings):
        why = "quantised as well" if settings.get("config_groups") else "in a format not known here"
        return (
            f"{folder} is packed as {settings['sparsity_config']['format']}, and {why}. Name the "
            "model that it was made from."
        )
    method = settings.get("quant_method", "an unnamed method")
    return (
        f"{folder} is quantised by {method} (quantization_config in config.json), which cannot be "
        f"read here; {', '.join(FORMATS)} can. Name the unquantised model instead."
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the plain model: without a word on quantisation or dtypes, which are
    those of the source.
    """
    left_out = (*KEYS, "dtype", "torch_dtype")
    return {
        key: plain_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in left_out
    }


def _files(checkpoint: Checkpoint) -> dict[str, File]:
    """What is copied beside the weights: tokenizer, templates, code."""
    written = {checkpoint.folder / name for name in ("config.json", INDEX, SOURCE)}
    return {
        file.relative_to(checkpoint.folder).as_posix(): file
        for file in belonging_files(checkpoint)
        if file not in written
    }
