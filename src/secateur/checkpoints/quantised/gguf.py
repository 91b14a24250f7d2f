"""GGUF, what llama.cpp loads, as a source: one file with settings, vocabulary and weights.

transformers loads the whole model at once, cannot save it, and drops settings without a word. Here
the `gguf` package names the tensors and dequantises them one at a time, and they become the tensors
of a checkpoint as transformers writes one: experts apart, rows of query and key in its own order
(gguf_architectures.py). Settings are in gguf_settings.py, vocabularies in gguf_tokenizer.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.checkpoints.quantised.base import DenseTensor, PlainSource
from secateur.checkpoints.quantised.gguf_architectures import EXPERTS, Architecture
from secateur.checkpoints.quantised.gguf_settings import Contents, architecture_in, gguf_config
from secateur.checkpoints.quantised.gguf_tokenizer import tokenizer_files
from secateur.errors import (
    LIBRARY_ERRORS,
    BadCheckpoint,
    SecateurError,
    UnsupportedModel,
    in_one_line,
)
from secateur.system.files import identity

SUFFIX = ".gguf"
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that tell how the rotation is scaled."""
_HELD_AS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I32": np.int32}
"""How the reader gives tensors that are no blocks of bytes."""
LONG = 1000
"""Entries of a list that no setting of a model has."""


class Reading(NamedTuple):
    """A GGUF file while its tensors are read: the model they belong to, without weights, its
    parameters by name, and what is known of its architecture.
    """

    model: PreTrainedModel
    parameters: dict[str, Tensor]
    architecture: Architecture


def is_gguf(place: Path) -> bool:
    """Whether a file is a model by itself: it ends in `.gguf`, and is there."""
    return place.suffix.lower() == SUFFIX and place.is_file()


def gguf_source(file: Path) -> PlainSource:
    """The model in a GGUF file, as a plain checkpoint. Raises BadCheckpoint, UnsupportedModel."""
    stamp, (reader, settings) = identity(file), _opened(file)
    _refuse_other_kinds(file, settings)
    _refuse_gaps(file, reader)
    _refuse_unknown_types(file, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(size) for size in t.shape[::-1]) for name, t in tensors.items()}
    factors = {name: np.array(tensors.pop(name).data) for name in FACTORS if name in tensors}
    contents = Contents(file, settings, shapes, factors)
    architecture = architecture_in(contents)
    _refuse_empty_blocks(contents)
    with _refusing(contents):
        config = gguf_config(contents, architecture)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        reading = Reading(model, model.state_dict(), architecture)
        parts = {
            name: [tensors.pop(part) for part in names if part in tensors]
            for name, names in _names(contents, reading).items()
        }
        dense = tuple(_tensors(file, reading, {name: p for name, p in parts.items() if p}))
        files = tokenizer_files(file, settings, shapes["token_embd.weight"][0])
    for name in tensors:
        raise UnsupportedModel(
            f"{name} in {file} has no place in {type(model).__name__}: it would be lost. Use the "
            "original checkpoint."
        )
    config.architectures = [type(model).__name__]
    config._name_or_path = ""
    plain = {key: value for key, value in config.to_diff_dict().items() if key != "dtype"}
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    return PlainSource(
        format=f"GGUF ({', '.join(name for name, _ in kinds.most_common())})",
        origin=file,
        weights=(file,),
        config=plain,
        tensors=dense,
        files=files,
        identity=stamp,
    )


def _opened(file: Path) -> tuple[Any, dict[str, Any]]:
    """The file opened by the `gguf` package, and its settings but for long lists. Raises
    UnsupportedModel without the package, BadCheckpoint.
    """
    try:
        gguf = import_module("gguf")
    except ImportError as error:
        raise UnsupportedModel(
            f"Reading {file} needs the package gguf: pip install 'secateur[gguf]'."
        ) from error
    try:
        reader = _quick_reader(gguf)(file)
        return reader, {
            name: field.contents()
            for name, field in reader.fields.items()
            if len(field.data) < LONG
        }
    except LIBRARY_ERRORS as error:
        raise BadCheckpoint(
            f"{file} is no sound GGUF file ({in_one_line(error)}). It may be cut short; fetch it "
            "again."
        ) from error


def _quick_reader(gguf: Any) -> Any:
    """The package's reader, but that nothing may lie behind the end of the file, and without the
    entries of long lists, such as the vocabulary: each takes it 20 microseconds, so Gemma's 20
    seconds.
    """
    array, text = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
    short = "it ends before what it announces"

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(short)
            return super()._get(offset, dtype, count, **order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, Any, Any, Any]:
            whole = super()._get_field_parts
            if raw_type != array or self.byte_order != "I":
                return whole(orig_offs, raw_type)
            data, place = memoryview(self.data), orig_offs + 12
            kind = int.from_bytes(data[orig_offs : orig_offs + 4], "little")
            count = int.from_bytes(data[orig_offs + 4 : place], "little")
            number = self.gguf_scalar_to_np.get(kind)
            if count < LONG or (kind != text and number is None):
                return whole(orig_offs, raw_type)
            if number is not None:
                place += count * np.dtype(number).itemsize
            else:
                for _ in range(count):
                    place += 8 + int.from_bytes(data[place : place + 8], "little")
                    if place > len(data):
                        break
            if place > len(data):
                raise ValueError(short)
            return place - orig_offs, [], range(count), [array, gguf.GGUFValueType(kind)]

    return Reader


@contextmanager
def _refusing(contents: Contents) -> Iterator[None]:
    """Turn what transformers raises for settings that it does not take into UnsupportedModel."""
    try:
        yield
    except SecateurError:
        raise
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"{contents.file} holds a model of the architecture {contents.architecture!r} whose "
            f"settings transformers does not take: {in_one_line(error)}. Use the original "
            "checkpoint."
        ) from error


def _refuse_other_kinds(file: Path, settings: dict[str, Any]) -> None:
    """Raise BadCheckpoint for a file that holds no whole language model."""
    if "general.architecture" not in settings:
        raise BadCheckpoint(f"{file} names no architecture; a model's GGUF file was wanted.")
    kind = settings.get("general.type", "model")
    if kind != "model" or settings["general.architecture"] == "clip":
        raise BadCheckpoint(
            f"{file} holds {kind} ({settings['general.architecture']}), no language model."
        )
    if settings.get("split.count", 1) not in (0, 1):
        raise BadCheckpoint(
            f"{file} is one of {settings['split.count']} parts. Join them first: llama-gguf-split "
            f"--merge {file.name} whole.gguf."
        )


def _refuse_gaps(file: Path, reader: Any) -> None:
    """Raise BadCheckpoint unless the tensors follow one another, as llama.cpp wants them to."""
    end = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != end:
            raise BadCheckpoint(
                f"{tensor.name} in {file} lies at byte {tensor.data_offset}, and {end} was wanted, "
                "where the tensor before it ends. Fetch the file again."
            )
        end += -(-tensor.n_bytes // reader.alignment) * reader.alignment


def _refuse_empty_blocks(contents: Contents) -> None:
    """Raise BadCheckpoint for more blocks than tensors: an empty model of a million takes minutes
    to make.
    """
    blocks, count = contents.own().get("block_count"), len(contents.shapes)
    if isinstance(blocks, int) and blocks > count:
        raise BadCheckpoint(f"{contents.file} sets {blocks} blocks and holds {count} tensors.")


def _names(contents: Contents, reading: Reading) -> dict[str, tuple[str, ...]]:
    """The tensors of the file behind each parameter of the model."""
    gguf = import_module("gguf")
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[contents.architecture]
    table = gguf.get_tensor_name_map(arch, reading.model.config.num_hidden_layers)
    own = {**EXPERTS, **reading.architecture.names}
    names: dict[str, tuple[str, ...]] = {}
    for name in reading.parameters:
        leaves = next((leaves for end, leaves in own.items() if name.endswith(f".{end}")), ())
        block = re.search(r"\.(\d+)\.", name)
        if leaves and block:
            names[name] = tuple(f"blk.{block[1]}.{leaf}" for leaf in leaves)
            continue
        inner = name.partition(".")[2]  # some models are converted without their head
        known = (table.get_name(n, try_suffixes=(".weight", ".bias")) for n in (name, inner))
        names[name] = tuple(n for n in known if n)[:1]
    return names


def _tensors(file: Path, reading: Reading, parts: dict[str, list[Any]]) -> Iterator[DenseTensor]:
    """Every tensor of the plain checkpoint. Raises UnsupportedModel where one is missing,
    BadCheckpoint where one has another size.
    """
    model, parameters = reading.model, reading.parameters
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if missing := sorted(parameters.keys() - parts.keys() - tied):
        raise UnsupportedModel(f"{file} lacks {missing[0]} ({len(missing)} tensors in all).")
    # The experts of a parameter are asked for one after the other; of all, the last is kept.
    whole = lru_cache(maxsize=1)(lambda name: _stored(reading, name, parts[name]))

    def one(name: str, stored: str) -> Tensor:
        return whole(name)[stored]

    for name, tensors in parts.items():
        count = sum(tensor.n_elements for tensor in tensors)
        if name in parameters and count != parameters[name].numel():
            raise BadCheckpoint(
                f"{tensors[0].name} in {file} holds {count} numbers, and {name} is "
                f"{list(parameters[name].shape)} by the file's settings. Fetch the file again."
            )
        meta = revert_weight_conversion(model, {name: parameters[name]})
        kind = "/".join(sorted({tensor.tensor_type.name for tensor in tensors}))
        share = sum(tensor.n_bytes for tensor in tensors) // len(meta)
        for stored, tensor in meta.items():
            shape = tuple(tensor.shape)
            yield DenseTensor(stored, shape, partial(one, name, stored), kind, share)


def _dequantised(data: np.ndarray, kind: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is named later
        return import_module("gguf").dequantize(data, kind)


def _refuse_unknown_types(file: Path, reader: Any) -> None:
    """Raise UnsupportedModel for a type that the `gguf` package does not dequantise."""
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        _, size = import_module("gguf").GGML_QUANT_SIZES[kind]
        try:
            _dequantised(np.zeros((1, size), _HELD_AS.get(kind.name, np.uint8)), kind)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{file} holds tensors in {kind.name}, which the package gguf cannot dequantise. "
                "Use the original checkpoint, or a file of another type."
            ) from error


def _stored(reading: Reading, name: str, tensors: Sequence[Any]) -> dict[str, Tensor]:
    """A parameter, dequantised from the tensors of the file that it is made of, as the tensors of
    the plain checkpoint that it is stored as.
    """
    weights = [_dequantised(tensor.data, tensor.tensor_type) for tensor in tensors]
    value = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)  # gate, then up
    for end, undo in reading.architecture.undo.items():
        if tensors[0].name.endswith(end):
            value = undo(reading.model.config, value)
    shape = reading.parameters[name].shape
    if [size for size in value.shape if size > 1] == [size for size in shape if size > 1]:
        value = value.reshape(shape)  # llama.cpp drops and adds dimensions of one
    return dict(revert_weight_conversion(reading.model, {name: torch.from_numpy(np.array(value))}))
