"""GGUF, what llama.cpp loads: one file with settings, vocabulary and weights, tensor by tensor.

The names of tensors and settings are those of the `gguf` package. Llama and Mistral are one
architecture to llama.cpp, whose rotation pairs neighbouring rows of query and key where
transformers pairs row i with row i + half, so those rows change places. Vectors are always float32,
as llama.cpp wants them. The vocabulary is in gguf_vocabulary.py.

Zeros are stored like other numbers. Values of a grid become the blocks that llama.cpp has for it,
with the same levels (gguf_blocks.py): the weight matrices of the blocks alone, while embedding and
head stay. What is not written: mixtures of experts, yarn and dynamic rotation, and windowed
attention beyond its window, to which the context is limited.
"""

from contextlib import closing
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.checkpoints.folder import FLOATS, Checkpoint
from secateur.deployment.formats.base import Format, head_size, refuse_non_finite
from secateur.deployment.formats.codes import left_out, rounding_note, values_of
from secateur.deployment.formats.gguf_blocks import (
    OF_SIX_BITS,
    blocks,
    find_grid,
    six_bits,
    type_of,
)
from secateur.deployment.formats.gguf_vocabulary import add_vocabulary
from secateur.errors import BadCheckpoint, BadPattern, NonFinite, UnsupportedModel
from secateur.methods.values import AS_STORED, Values, find_codes
from secateur.models.load import load_config
from secateur.models.parts import architecture_of
from secateur.system.files import disk_errors

FILE = "model.gguf"
ROUNDED = {"q8_0": 32, "q6_k": OF_SIX_BITS, "q5_0": 32}
"""What every matrix is rounded to, to nearest, and the weights of a block."""
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"} | {
    name: f"MOSTLY_{name.upper()}" for name in ROUNDED
}
VALUES = (AS_STORED, *FILE_TYPES)
"""What tensors are cast to; besides these, the grids of gguf_blocks.py."""
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class Entry(NamedTuple):
    """A tensor's name in GGUF, its heads whose rows change places, its `GGMLQuantizationType`, and
    the grid whose levels it holds; None for one that is cast.
    """

    name: str
    heads: int
    type: Any
    grid: Values | None = None


def gguf_package() -> ModuleType:
    """The `gguf` package. Raises UnsupportedModel where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise UnsupportedModel(
            "The package gguf is not installed. Install it: pip install 'secateur[gguf]'."
        ) from error


def write(source: Checkpoint, folder: Path, *, values: str | None = None) -> str | None:
    """Write `model.gguf`; gives a sentence where weights are not what one may have thought.

    By default with the values that the checkpoint was pruned with, where GGUF has them, else as
    stored. Raises UnknownName, UnsupportedModel, BadPattern, NonFinite.
    """
    pruned = values_of(source.folder)
    lost = values is None and pruned is not None and type_of(pruned) is None
    if values is None:
        values = str(pruned) if pruned is not None and not lost else AS_STORED
    note = write_gguf(source, folder / FILE, values=values)
    if lost:
        return f"GGUF has no blocks for {pruned}, with which it was pruned; written as stored."
    return note


def write_gguf(
    source: Checkpoint, file: Path, *, values: str, vocabulary: bool = True
) -> str | None:
    """Write one file; without `vocabulary` it takes token numbers only. Else as `write`."""
    grid = find_grid(values, VALUES)
    gguf = gguf_package()
    config = load_config(source.folder)
    architecture = _architecture(source.folder, config)
    entries = _entries(gguf, source, config, AS_STORED if grid else values)
    if grid:
        entries |= _on_grid(gguf, source, entries, grid)
    factors = _rotary_factors(source.folder, config, architecture)
    rounded = list[str]()
    with disk_errors(file.parent), closing(gguf.GGUFWriter(file, architecture)) as writer:
        _add_settings(gguf, writer, config, values, grid)
        if vocabulary:
            add_vocabulary(gguf, writer, source.folder, config.vocab_size)
        else:
            writer.add_tokenizer_model("no_vocab")
        for name, entry in entries.items():
            shape, kind = source.places[name].shape, entry.type
            size = prod(gguf.quant_shape_to_byte_shape(shape, kind))
            writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        if factors is not None:
            new_name = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
            writer.add_tensor_info(new_name, factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, entry in entries.items():
            data, was_rounded = _data(gguf, source, name, entry)
            writer.write_tensor_data(data)
            rounded += [name.removesuffix(".weight")] * was_rounded
        if factors is not None:
            writer.write_tensor_data(factors)
    matrices = sum(entry.grid is not None for entry in entries.values())
    return rounding_note(grid, rounded, matrices) if grid else None


def _on_grid(
    gguf: Any, source: Checkpoint, entries: dict[str, Entry], grid: Values
) -> dict[str, Entry]:
    """The weight matrices of the blocks, which get the levels of a grid. What a pruning left out
    stays out unless it has them. Raises BadPattern, NonFinite.
    """
    kind = gguf.GGMLQuantizationType[type_of(grid)]
    may_stay = {f"{module}.weight" for module in left_out(source.folder)}
    chosen = dict[str, Entry]()
    for name, entry in entries.items():
        shape = source.places[name].shape
        if not entry.name.startswith("blk.") or len(shape) != 2:
            continue
        if name in may_stay and find_codes(source.tensor(name), grid) is None:
            continue
        grid.check((shape[0], shape[1]), name.removesuffix(".weight"), can_skip=False)
        refuse_non_finite(name, source.tensor(name))
        chosen[name] = entry._replace(type=kind, grid=grid)
    return chosen


def _data(gguf: Any, source: Checkpoint, name: str, entry: Entry) -> tuple[np.ndarray, bool]:
    """A tensor's bytes as llama.cpp wants them, and whether it was rounded to a grid.

    Raises NonFinite where f16 cannot hold it.
    """
    tensor = source.tensor(name)
    if entry.heads:  # the rows of each head in the order 0, half, 1, half + 1, …
        half = tensor.shape[0] // entry.heads // 2
        halves = tensor.reshape(entry.heads, 2, half, -1)
        tensor = halves.transpose(1, 2).reshape(tensor.shape)  # [heads, half, 2, in] → [out, in]
    if entry.grid is not None:
        return blocks(tensor, entry.grid, name)
    if entry.type is gguf.GGMLQuantizationType.Q6_K:
        refuse_non_finite(name, tensor)
        return six_bits(tensor, name), False
    value = tensor.float().contiguous().numpy()
    narrow = entry.type is gguf.GGMLQuantizationType.F16
    if narrow and (largest := np.abs(value).max()) > np.finfo(np.float16).max:
        raise NonFinite(f"{name} holds {largest:.0f}, more than f16 can hold. Write bf16 or f32.")
    return gguf.quantize(value, entry.type), False


def _architecture(folder: Path, config: Any) -> str:
    """llama.cpp's name of the architecture. Raises UnsupportedModel."""
    name = architecture_of(config)
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{folder} is a {name}; as GGUF are written: {', '.join(ARCHITECTURES)}."
        )
    if config.hidden_act != "silu":
        raise UnsupportedModel(
            f"{folder} computes with {config.hidden_act}; llama.cpp's {name} has silu only."
        )
    rows = config.num_attention_heads * head_size(config)
    if name == "Qwen2ForCausalLM" and rows != config.hidden_size:
        raise UnsupportedModel(
            f"{folder} has {rows} query rows and a hidden size of {config.hidden_size}; llama.cpp "
            "loads a Qwen2 only where they are equal. Prune channels or blocks instead of heads."
        )
    return ARCHITECTURES[name]


def _entries(gguf: Any, source: Checkpoint, config: Any, values: str) -> dict[str, Entry]:
    """What becomes of every tensor. Raises UnsupportedModel, BadCheckpoint, BadPattern."""
    architecture = ARCHITECTURES[architecture_of(config)]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    llama = architecture == "llama"
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    entries: dict[str, Entry] = {}
    for name, place in source.places.items():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied or name.endswith("rotary_emb.inv_freq"):
            continue
        layer, _, kind = name.rpartition(".")
        new_name = known.get_name(name, try_suffixes=(".weight", ".bias"))
        allowed = kind != "bias" or llama or layer.endswith(("q_proj", "k_proj", "v_proj"))
        if new_name is None or not allowed:
            raise UnsupportedModel(f"{name} has no place in llama.cpp's {architecture}.")
        heads = rotated.get(layer.rpartition(".")[2], 0) if llama else 0
        if heads and place.shape[0] != heads * head_size(config):
            raise UnsupportedModel(
                f"{name} has {place.shape[0]} rows, "
                f"config.json says {heads} heads of {head_size(config)}."
            )
        entries[name] = Entry(new_name, heads, _tensor_type(gguf, source, name, values))
    if "lm_head.weight" not in source.places and not config.tie_word_embeddings:
        raise BadCheckpoint(
            f"{source.folder} has no lm_head.weight, "
            "and config.json does not tie it to the embedding."
        )
    return entries


def _tensor_type(gguf: Any, source: Checkpoint, name: str, values: str) -> Any:
    """The `GGMLQuantizationType` of a tensor."""
    place = source.places[name]
    if len(place.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if values == AS_STORED and place.dtype not in ("F32", "F16", "BF16"):
        raise UnsupportedModel(
            f"{name} is stored as {place.dtype}, which llama.cpp lacks. Choose values f32."
        )
    if place.dtype not in FLOATS:
        raise UnsupportedModel(
            f"{name} is stored as {place.dtype}; a floating-point tensor was wanted."
        )
    if place.shape[-1] % (size := ROUNDED.get(values, 1)):
        raise BadPattern(
            f"{values} needs rows in {size}s; {name} has rows of {place.shape[-1]}. "
            "Choose other values."
        )
    return gguf.GGMLQuantizationType[place.dtype if values == AS_STORED else values.upper()]


def _add_settings(gguf: Any, writer: Any, config: Any, values: str, grid: Values | None) -> None:
    """The sizes and constants of the model."""
    if grid or values in FILE_TYPES:
        mixture = "_MOE" * (grid is not None and grid.name == "mxfp4")  # the one that there is
        kind = f"MOSTLY_{type_of(grid)}{mixture}" if grid else FILE_TYPES[values]
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layer_types = getattr(config, "layer_types", None)
    windowed = layer_types is None or "sliding_attention" in layer_types
    window = getattr(config, "sliding_window", None) if windowed else None
    length = config.max_position_embeddings
    writer.add_context_length(min(length, window or length))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rotary_factors(folder: Path, config: Any, architecture: str) -> np.ndarray | None:
    """What the rotation's frequencies are divided by, `[half a head] float32`; None: by nothing."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "of each layer")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedModel(
            f"{folder} rotates a part of each head only, which is not written as GGUF."
        )
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or architecture != "llama":
        raise UnsupportedModel(
            f"{folder} has a {architecture} rotation {kind!r}; "
            "default, linear, or llama3 in a Llama."
        )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    return (rope["rope_theta"] ** -exponents / scaled).numpy()


gguf = Format(
    write,
    "llama.cpp (tried: the one in llama-cpp-python 0.3.36)",
    frozenset({"values"}),
    packages=("gguf",),
)
