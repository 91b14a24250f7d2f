"""GGUF, what llama.cpp loads, as a source: one file with settings, vocabulary and weights.

transformers knows which tensor is which, but only loads the whole model at once, and cannot save
it. Here its tables name the tensors, the `gguf` package dequantises them one at a time, and they
become the tensors of a checkpoint as transformers writes one: experts apart, rows of query and key
in its own order. Settings are in gguf_settings.py, vocabularies in gguf_tokenizer.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from secateur.checkpoints.quantised.base import DenseTensor, PlainSource
from secateur.checkpoints.quantised.gguf_settings import gguf_config
from secateur.checkpoints.quantised.gguf_tokenizer import tokenizer_files
from secateur.errors import (
    LIBRARY_ERRORS,
    BadCheckpoint,
    SecateurError,
    UnsupportedModel,
    in_one_line,
)

SUFFIX = ".gguf"
ROPE_FACTORS = "rope_freqs.weight"
_HELD_AS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I32": np.int32}
"""How the reader gives tensors that are no blocks of bytes."""
LONG = 1000
"""Entries of a list that no setting of a model has."""


class Reading(NamedTuple):
    """A GGUF file while its tensors are read: the model they belong to, without weights, and what
    turns them into its parameters.
    """

    model: PreTrainedModel
    processor: TensorProcessor
    names: dict[str, str]


def is_gguf(place: Path) -> bool:
    """Whether a file is a model by itself: it ends in `.gguf`, and is there."""
    return place.suffix == SUFFIX and place.is_file()


def gguf_source(file: Path) -> PlainSource:
    """The model in a GGUF file, as a plain checkpoint. Raises BadCheckpoint, UnsupportedModel."""
    reader, settings = _opened(file)
    _refuse_other_kinds(file, settings)
    _refuse_gaps(file, reader)
    _refuse_unknown_types(file, reader)
    architecture = settings["general.architecture"]
    factors = [np.array(t.data) for t in reader.tensors if t.name == ROPE_FACTORS]
    with _refusing(file, architecture), _read_once(reader):
        config = gguf_config(file, settings, factors[0] if factors else None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
        reading = Reading(model, processor, get_gguf_hf_weights_map(model, processor))
        parts: dict[str, list[Any]] = defaultdict(list)
        for tensor in reader.tensors:
            if tensor.name != ROPE_FACTORS:
                parts[_parameter(file, reading, tensor.name)].append(tensor)
        tensors = tuple(_tensors(file, reading, parts))
        files = tokenizer_files(file, settings)
    config.architectures = [type(model).__name__]
    config._name_or_path = ""
    plain = {key: value for key, value in config.to_diff_dict().items() if key != "dtype"}
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    return PlainSource(
        format=f"GGUF ({', '.join(name for name, _ in kinds.most_common())})",
        origin=file,
        weights=(file,),
        config=plain,
        tensors=tensors,
        files=files,
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

    class Reader(gguf.GGUFReader):
        """The package's, but that nothing may lie behind the end of the file."""

        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before what it announces")
            return super()._get(offset, dtype, count, **order)

    try:
        reader = Reader(file)
        return reader, {
            name: field.contents()
            for name, field in reader.fields.items()
            if len(field.data) < LONG  # not the vocabulary: a second for a hundred thousand tokens
        }
    except LIBRARY_ERRORS as error:
        raise BadCheckpoint(
            f"{file} is no sound GGUF file ({in_one_line(error)}). It may be cut short; fetch it "
            "again."
        ) from error


@contextmanager
def _read_once(reader: Any) -> Iterator[None]:
    """While open, transformers gets this reader, and one table of names: it would open the file
    anew, and make the table for every module, seconds each.
    """
    gguf = import_module("gguf")
    table = lru_cache(gguf.get_tensor_name_map)
    with patch.multiple(gguf, GGUFReader=lambda _: reader, get_tensor_name_map=table):
        yield


@contextmanager
def _refusing(file: Path, architecture: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it does not know into UnsupportedModel."""
    try:
        yield
    except SecateurError:
        raise
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"{file} holds a model of the architecture {architecture!r}, which transformers cannot "
            f"take from GGUF: {in_one_line(error)}. Use the original checkpoint."
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


def _parameter(file: Path, reading: Reading, name: str) -> str:
    """The model's parameter behind a tensor's name. Raises UnsupportedModel where it has none."""
    for known in (name, name.removesuffix(".weight")):
        if known in reading.names:
            return reading.names[known]
    raise UnsupportedModel(
        f"{name} in {file} has no place in {type(reading.model).__name__}: it would be lost. Use "
        "the original checkpoint."
    )


def _tensors(file: Path, reading: Reading, parts: dict[str, list[Any]]) -> Iterator[DenseTensor]:
    """Every tensor of the plain checkpoint. Raises UnsupportedModel where one is missing,
    BadCheckpoint where one has another size.
    """
    model = reading.model
    parameters = dict(model.state_dict())
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if missing := sorted(parameters.keys() - parts.keys() - tied):
        raise UnsupportedModel(f"{file} lacks {missing[0]} ({len(missing)} tensors in all).")
    for name, tensors in parts.items():
        read = lru_cache(maxsize=1)(partial(_stored, reading, name, tuple(tensors)))
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
            yield DenseTensor(stored, shape, partial(_one, read, stored), kind, share)


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


def _one(read: Callable[[], dict[str, Tensor]], name: str) -> Tensor:
    return read()[name]


def _stored(reading: Reading, name: str, tensors: Sequence[Any]) -> dict[str, Tensor]:
    """A parameter, dequantised from the tensors of the file that it is made of, as the tensors of
    the plain checkpoint that it is stored as.
    """
    made: dict[str, Any] = {"tensors": {}}  # where transformers puts what it stacks
    value = torch.empty(0)
    for tensor in tensors:
        weights = _dequantised(tensor.data, tensor.tensor_type)
        done = reading.processor.process(
            weights=weights,
            name=tensor.name,
            tensor_key_mapping=reading.names,
            parsed_parameters=made,
        )
        value = torch.from_numpy(np.array(done.weights))
    value = made["tensors"].get(name, value)
    return dict(revert_weight_conversion(reading.model, {name: value}))
