"""Hooks that see what enters the linear layers and the fused experts of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.models import experts
from secateur.models.matrices import weight_matrices

Visit = Callable[[list[tuple[str, Tensor]]], None]


@contextmanager
def visited(block: nn.Module, visit: Visit) -> Iterator[None]:
    """While open, `visit([(site name, x [tokens, in]), …])` is called wherever a forward of the
    block reaches sites.

    A linear layer comes alone; the first matrices of fused experts come together, and after them
    the second ones, whose inputs are computed when the first call has returned.
    """

    def linear(name: str) -> Callable[..., None]:
        return lambda module, args: visit([(name, args[0])])

    def fused(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, chosen, *_ = *args, *kwargs.values()
            first, second = experts.matrices(module)
            visit([(f"{name}.{e}.{first}", x) for e, x in experts.routed(module, hidden, chosen)])
            inner = (
                (e, experts.inner(module, e, x)) for e, x in experts.routed(module, hidden, chosen)
            )
            visit([(f"{name}.{e}.{second}", x) for e, x in inner])

        return hook

    known, handles = weight_matrices(block), []
    for name, module in block.named_modules():
        if experts.is_experts(module):
            handles.append(module.register_forward_pre_hook(fused(name), with_kwargs=True))
        elif name in known:
            handles.append(module.register_forward_pre_hook(linear(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_inputs(block: nn.Module, record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `record(site name, x [tokens, in])` is called for every site a forward of the
    block reaches.
    """

    def visit(reached: list[tuple[str, Tensor]]) -> None:
        for name, x in reached:
            record(name, x)

    with visited(block, visit):
        yield
