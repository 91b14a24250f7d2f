"""How much a block's output changes, to first order, when one of its units is gone: scores through gradients.

With x_g the inputs of a unit and J_g the derivative of the block's output by them, the score is E‖J_g x_g‖² over
tokens. It sees what follows in the block (the feed-forward after the attention, norms), where `energy` sees the one
matrix; for a matrix whose output is simply added, both are the same. A random projection r of the output gives
E (rᵀ J_g x_g)² = ‖J_g x_g‖² (Hutchinson's estimator), so one backward pass of each batch does. Gradients end at the
block's border, unlike in LLM-Pruner (Ma et al. 2023, arXiv:2305.11627), whose score is of the whole model's loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.replay import Call, in_float32, run_block


def taylor(block: nn.Module, consumer: str, units: Tensor, batches: Iterable[tuple[Tensor, Call]]) -> Tensor:
    """The score of every unit of a consumer, float64 `[units]`, a sum over tokens.

    `units` are its inputs `[units, inputs of each]`; the block is float32. Only for a module of its own, no expert.
    """
    held: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held[:] = [args[0].detach().requires_grad_()]
        return (held[0], *args[1:])

    draw = torch.Generator().manual_seed(0)
    score = torch.zeros(len(units), dtype=torch.float64)
    handle = block.get_submodule(consumer).register_forward_pre_hook(catch)
    try:
        with torch.enable_grad():
            for hidden, call in batches:
                output = run_block(block, hidden.float(), in_float32(call))
                projection = torch.randn(output.shape, generator=draw).to(output.device)
                (gradient,) = torch.autograd.grad(output, held[0], projection)
                change = (held[0].detach() * gradient).flatten(0, -2)[:, units]  # [tokens, units, inputs]
                score += change.sum(-1).double().square().sum(0).cpu()
    finally:
        handle.remove()
    return score
