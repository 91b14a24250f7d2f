"""What reaches the experts of a block, caught at their door: the slow, obvious way."""

import torch
from torch import Tensor, nn

from secateur.models.replay import Call


def caught_at(block: nn.Module, name: str, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens `[tokens, in]`, their experts, the gates of those), `[tokens, top_k]`, of one forward pass."""
    found: list[list[Tensor]] = []
    hook = block.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: found.append([*args, *kwargs.values()]), with_kwargs=True
    )
    block(hidden, *call.args, **call.kwargs)
    hook.remove()
    x, chosen, gates = found[0]
    x, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
    gates = gates.reshape(len(x), -1)
    return x, chosen, gates if gates.shape == chosen.shape else torch.gather(gates, 1, chosen)
