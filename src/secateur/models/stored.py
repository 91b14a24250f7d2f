"""The weight matrices of a checkpoint, read from its shards one by one."""

from __future__ import annotations

from typing import NamedTuple

from secateur.checkpoints.folder import Checkpoint
from secateur.errors import UnsupportedModel, in_one_line
from secateur.models.checks import LOAD_ERRORS, foreign, without_weights
from secateur.models.load import checkpoint_tensors, find_stack, load_config
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel


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
    """The tensors of a checkpoint that are sites, or several, by name; and the coverage. Raises
    UnsupportedModel.
    """
    config = load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    try:
        model = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{checkpoint.folder} describes no causal LM: {in_one_line(error)}."
        ) from error
    language_model = LanguageModel(model, find_stack(model), ())
    found: dict[str, Stored] = {}
    covered = total = 0
    for index, block in enumerate(language_model.blocks):
        total += sum(p.numel() for p in block.parameters() if p.dim() > 1)
        parameters: dict[str, Stored] = {}
        for site in weight_matrices(block).values():
            covered += site.stored.numel()
            name = f"{language_model.block_name(index)}.{site.parameter}"
            parameters[name] = Stored(name, site.transposed, site.expert)
        for name, held in parameters.items():
            parameter = {name: model.get_parameter(name).data}
            for stored, tensor in checkpoint_tensors(
                language_model, parameter, checkpoint.places
            ).items():
                if (shape := checkpoint.places[stored].shape) != tuple(tensor.shape):
                    raise foreign(
                        checkpoint.folder, f"{stored} is {list(shape)}, not {list(tensor.shape)}"
                    )
                found[stored] = held
    return found, covered / max(total, 1)


def unknown_matrices(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every matrix, taken for a linear layer: for an architecture that transformers does not
    know.
    """
    matrices = (name for name, place in checkpoint.places.items() if len(place.shape) > 1)
    return {name: Stored(name, transposed=False, expert=False) for name in matrices}
