"""Which tensors of a checkpoint are weight matrices, asked of a model without weights."""

from functools import cache
from typing import NamedTuple
from unittest.mock import patch

from transformers import conversion_mapping

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import UnsupportedModel, in_one_line
from secateur.models.checks import LOAD_ERRORS, foreign, without_weights
from secateur.models.load import checkpoint_config, find_stack
from secateur.models.matrices import model_coverage, weight_matrices
from secateur.models.replay import LanguageModel
from secateur.models.source import checkpoint_tensors


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
    config = checkpoint_config(checkpoint, trust_remote_code=trust_remote_code)
    try:
        model = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{checkpoint.folder} describes no causal LM: {in_one_line(error)}."
        ) from error
    language_model = LanguageModel(model, find_stack(model), ())
    # It goes through all modules, and is asked for every matrix.
    mapping = cache(conversion_mapping.get_model_conversion_mapping)
    with patch.object(conversion_mapping, "get_model_conversion_mapping", mapping):
        matrices = _matrices_of(checkpoint, language_model)
    return matrices, model_coverage(language_model)


def _matrices_of(checkpoint: Checkpoint, language_model: LanguageModel) -> dict[str, Stored]:
    """The tensors of a checkpoint that are weight matrices of a model without weights."""
    matrices: dict[str, Stored] = {}
    for index, block in enumerate(language_model.blocks):
        parameters: dict[str, Stored] = {}
        for matrix in weight_matrices(block).values():
            name = f"{language_model.block_name(index)}.{matrix.parameter}"
            parameters[name] = Stored(name, matrix.transposed, matrix.expert)
        for name, described in parameters.items():
            parameter = {name: language_model.model.get_parameter(name).data}
            tensors = checkpoint_tensors(language_model, parameter, checkpoint.places)
            for stored, tensor in tensors.items():
                if (shape := checkpoint.places[stored].shape) != tuple(tensor.shape):
                    raise foreign(
                        checkpoint.folder, f"{stored} is {list(shape)}, not {list(tensor.shape)}"
                    )
                matrices[stored] = described
    return matrices


def unknown_matrices(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every matrix, taken for a linear layer: for an architecture that transformers does not
    know.
    """
    matrices = (name for name, place in checkpoint.places.items() if len(place.shape) > 1)
    return {name: Stored(name, transposed=False, expert=False) for name in matrices}
