"""Loads a model whose matrices are packed as they are read: no dense copy of them is made."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.deployment.autotune import Crossovers
from secateur.deployment.packed_model import own_products, put_packed
from secateur.kernels.packed import Packed
from secateur.models.checks import LOAD_ERRORS, bad_weights, foreign, refuse_larger, refusing_more
from secateur.models.load import load_config
from secateur.models.parts import loader

ModuleOf = Callable[[str], str | None]
"""The linear layer that a tensor of a checkpoint is the weight of, by name; None for others."""
Read = Iterable[tuple[str, Tensor | Packed]]
"""The tensors of a checkpoint by name, packed where they are."""


def load_packing(
    folder: Path,
    read: Callable[[ModuleOf], Read],
    known: int,
    dtype: torch.dtype,
    *,
    measure: bool = True,
    **trust: Any,
) -> Any:
    """A transformers model of a folder's configuration, with the `known` tensors that `read` gives.

    Other tensors are cast to `dtype`. `measure` as for `pack_model`. Raises BadCheckpoint and
    UnsupportedModel.
    """
    config = load_config(folder, **trust)
    try:
        with torch.device("meta"), refusing_more(folder, known):
            skeleton = loader(config).from_config(config, **trust)
    except LOAD_ERRORS as error:
        raise bad_weights(folder, {}, config, None, error) from error
    state, packed = _read(read, skeleton, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_larger(folder, shapes, skeleton)
    try:
        model, report = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise bad_weights(folder, shapes, config, skeleton, error) from error
    if missing := sorted(report["missing_keys"]):
        more = " …" if len(missing) > 3 else ""
        raise foreign(folder, f"it lacks {', '.join(missing[:3])}{more}")
    model.eval()
    crossovers = Crossovers(dtype) if measure else None
    for name, matrix in packed.items():
        put_packed(model, name, matrix, crossovers)
    own_products(model)
    return model


def _read(
    read: Callable[[ModuleOf], Read], skeleton: Any, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Packed]]:
    """Tensors by name, with nothing behind those of packed linear layers, which come by module."""
    linear = {name for name, module in skeleton.named_modules() if type(module) is nn.Linear}
    prefix = f"{skeleton.base_model_prefix}."

    @cache
    def module_of(name: str) -> str | None:
        bare = name.removesuffix(".weight")
        names = (bare, bare.removeprefix(prefix), prefix + bare)
        return next((name for name in names if name in linear), None)

    state: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    for name, stored in read(module_of):
        module = module_of(name)
        if isinstance(stored, Tensor):
            state[name] = stored
        elif module is None:
            state[name] = stored.dense().contiguous()
        else:
            packed[module] = stored
            nothing = torch.zeros((), dtype=dtype)
            state[name] = nothing.expand(stored.rows, stored.columns)  # takes no memory
    return state, packed
