"""Calibration tokens for tiny models, and the inputs of their layers found the slow, obvious way."""

import torch

from secateur.data.windows import Windows

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 128, (7, 24), generator=torch.Generator().manual_seed(2))


def windows(tokens: torch.Tensor = TOKENS) -> Windows:
    """Calibration windows of given tokens."""
    return Windows(tokens, "random", "none", 2, None)


def seen_by_hooks(model, tokens, names) -> dict[str, torch.Tensor]:
    """The inputs of linear layers in one plain forward of the whole model: the slow, obvious way."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}
