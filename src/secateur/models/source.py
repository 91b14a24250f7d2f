"""The parameters of a model and the tensors of the checkpoint that they were loaded from.

What is loaded must be what is written and what is copied. So every tensor of a loaded model is
compared with the checkpoint once, before any work; what the model did not take is named.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from secateur.checkpoints.folder import DTYPES, Checkpoint
from secateur.errors import BadCheckpoint, UnsupportedModel, in_one_line
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel, block_number
from secateur.system.memory import MappedFiles, same_bytes


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
    try:
        reverted = revert_weight_conversion(language_model.model, dict(tensors))
    except ValueError as error:  # what it would put together is not all there
        raise UnsupportedModel(
            f"transformers cannot put single weights of {type(language_model.model).__name__} back "
            f"where they lie in the checkpoint ({in_one_line(error)}), so it cannot be used here."
        ) from error
    for name, tensor in reverted.items():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        if spelling := next((s for s in spellings if s in known), None):
            stored[spelling] = tensor
        elif name not in optional:
            raise UnsupportedModel(
                f"The checkpoint has no tensor {name!r}, which the model was loaded from."
            )
    return stored


@torch.no_grad()
def check_loaded(source: Checkpoint, language_model: LanguageModel) -> tuple[str, ...]:
    """Raise BadCheckpoint unless every tensor of a loaded model is what the checkpoint holds; the
    names of the tensors that the model did not take.

    transformers turns some tensors into others when it loads them; turned back, they must be what
    they were, in the dtype of the model. A tensor that lies in the mapped file itself, at its
    place, is not read again.
    """
    groups: dict[int | None, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in language_model.model.state_dict().items():
        groups[block_number(name, language_model.stack)][name] = tensor
    mapped, taken = MappedFiles(source.folder / shard for shard in source.shards), set[str]()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for tensors in groups.values():  # what was put together is taken apart a block at a time
            with _Uncopied():
                loaded = checkpoint_tensors(
                    language_model, tensors, source.places, optional=tensors
                )
            same = pool.map(partial(_is_stored, source, mapped), loaded, loaded.values())
            if wrong := [name for name, one in zip(loaded, same, strict=True) if not one]:
                raise BadCheckpoint(
                    f"{wrong[0]} in {source.folder / source.places[wrong[0]].shard} is not what "
                    "the model was loaded with. Leave one set of weights in the folder, and let it "
                    "be during a run."
                )
            taken |= loaded.keys()
    return tuple(sorted(source.places.keys() - taken))


class _Uncopied(TorchFunctionMode):
    """While open, `contiguous` copies nothing: parts of what was put together stay views of it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def _is_stored(source: Checkpoint, mapped: MappedFiles, name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a model is the one that the checkpoint holds, in the model's dtype."""
    place = source.places[name]
    if mapped.at(tensor) == (source.folder / place.shard, place.offset):
        return True
    stored = source.tensor(name)
    if stored.dtype != tensor.dtype:
        return torch.equal(stored.to(tensor.dtype), tensor)
    return stored.shape == tensor.shape and same_bytes(stored, tensor.contiguous())


def ignored_in_words(language_model: LanguageModel) -> str:
    """A sentence on the tensors of the checkpoint that the model did not take; empty without.

    Where the model has nothing of the kind (`mtp`), or no such block, all of it is one; of its own
    parts, tensors are named, with `*` for the numbers of blocks.
    """
    model, stack = language_model.model, language_model.stack
    names = [name for name, _ in model.named_parameters()]
    names += [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    roots, count = {name.partition(".")[0] for name in names}, len(language_model.blocks)

    def family(name: str) -> str:
        if (number := block_number(name, stack) or 0) >= count:
            return f"{stack}.{number}.*"
        root = name.partition(".")[0]
        return re.sub(r"\.\d+(?=\.)", ".*", name) if root in roots else f"{root}.*"

    counts = Counter(map(family, language_model.ignored))
    parts = [f"{name} ({n} tensor{'s' * (n > 1)})" for name, n in sorted(counts.items())]
    shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
    return (
        f"Left as it is, since {type(model).__name__} does not load it: {shown}." if parts else ""
    )


def check_dtypes(source: Checkpoint, language_model: LanguageModel) -> None:
    """Raise UnsupportedModel where a weight matrix is stored in another dtype than it was loaded
    in: what is kept of it would be rounded.
    """
    for index, block in enumerate(language_model.blocks):
        prefix = language_model.block_name(index)
        parameters = {matrix.parameter for matrix in weight_matrices(block).values()}
        loaded = {f"{prefix}.{name}": block.get_parameter(name).data for name in parameters}
        for name, tensor in checkpoint_tensors(language_model, loaded, source.places).items():
            dtype = DTYPES.get(source.places[name].dtype)
            if dtype != tensor.dtype:
                raise UnsupportedModel(
                    f"{name} in {source.folder} is stored as {source.places[name].dtype}, and "
                    f"most weights as {str(tensor.dtype).removeprefix('torch.')}, in which the "
                    "model is loaded; pruning would round it. Save the model in one dtype."
                )
