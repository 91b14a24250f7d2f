"""The parameters of a model and the tensors of the checkpoint that they were loaded from."""

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import UnsupportedModel, in_one_line
from secateur.models.checks import LOAD_ERRORS, foreign, without_weights
from secateur.models.load import find_stack, load_config
from secateur.models.matrices import model_coverage, weight_matrices
from secateur.models.replay import LanguageModel


def checkpoint_tensors(
    language_model: LanguageModel,
    tensors: Mapping[str, Tensor],
    known: Container[str],
    optional: Container[str] = (),
) -> dict[str, Tensor]:
    """Parameters by their name in the model, turned into the tensors by their name in the
    checkpoint.

    transformers renames and re-stacks weights when it loads them (experts above all) and knows the
    way back; `known` holds the names of the checkpoint. Raises UnsupportedModel for a name that it
    does not hold, unless that is `optional`.
    """
    prefix = f"{language_model.model.base_model_prefix}."
    stored: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(language_model.model, dict(tensors)).items():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        if spelling := next((s for s in spellings if s in known), None):
            stored[spelling] = tensor
        elif name not in optional:
            raise UnsupportedModel(
                f"The checkpoint has no tensor {name!r}, which the model was loaded from."
            )
    return stored


def check_source(source: Checkpoint, language_model: LanguageModel, names: Iterable[str]) -> None:
    """Raise UnsupportedModel unless the tensors, by their name in the model, are the bytes that the
    source holds.

    transformers turns some into others when it loads them; turned back, they must be what they
    were.
    """
    loaded = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        loaded[name] = getattr(language_model.model.get_submodule(owner), leaf).data
    for name, tensor in checkpoint_tensors(language_model, loaded, source.places).items():
        stored = source.tensor(name)
        if stored.dtype != tensor.dtype or not torch.equal(stored, tensor):
            raise UnsupportedModel(
                f"{name} in {source.folder} is not what the model was loaded with."
            )


class Stored(NamedTuple):
    """What the model knows of a tensor of the checkpoint: its parameter, whether it lies `[in,
    out]`, and whether it holds experts.
    """

    parameter: str
    transposed: bool
    expert: bool


def stored_matrices(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> tuple[dict[str, Stored], float]:
    """The tensors of a checkpoint that are weight matrices, or several, by name; and the coverage.

    Only their headers are read. Raises UnsupportedModel.
    """
    config = load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    try:
        model = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{checkpoint.folder} describes no causal LM: {in_one_line(error)}."
        ) from error
    language_model = LanguageModel(model, find_stack(model), ())
    matrices: dict[str, Stored] = {}
    for index, block in enumerate(language_model.blocks):
        parameters: dict[str, Stored] = {}
        for matrix in weight_matrices(block).values():
            name = f"{language_model.block_name(index)}.{matrix.parameter}"
            parameters[name] = Stored(name, matrix.transposed, matrix.expert)
        for name, described in parameters.items():
            parameter = {name: model.get_parameter(name).data}
            tensors = checkpoint_tensors(language_model, parameter, checkpoint.places)
            for stored, tensor in tensors.items():
                if (shape := checkpoint.places[stored].shape) != tuple(tensor.shape):
                    raise foreign(
                        checkpoint.folder, f"{stored} is {list(shape)}, not {list(tensor.shape)}"
                    )
                matrices[stored] = described
    return matrices, model_coverage(language_model)


def unknown_matrices(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every matrix, taken for a linear layer: for an architecture that transformers does not
    know.
    """
    matrices = (name for name, place in checkpoint.places.items() if len(place.shape) > 1)
    return {name: Stored(name, transposed=False, expert=False) for name in matrices}
