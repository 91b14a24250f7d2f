"""Hooks that see what enters the linear layers and the fused experts of a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from secateur.models import experts
from secateur.models.matrices import linear_layers


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], see: Callable[[str, list[Any]], None]
) -> Iterator[None]:
    """While open, `see(name, arguments)` is called before every forward of the modules.

    The arguments are those given by position, then those given by name.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(name, [*args, *kwargs.values()])

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield


class Reached(NamedTuple):
    """A weight matrix that a forward has reached, its input x, and, of an expert, which of the
    batch's tokens that is, `[tokens]` bool.
    """

    name: str
    x: Tensor
    tokens: Tensor | None = None


@contextmanager
def visited(block: nn.Module, visit: Callable[[list[Reached]], None]) -> Iterator[None]:
    """While open, call `visit([Reached, …])` where a forward reaches matrices.

    A linear layer comes alone; the first matrices of fused experts come together, and after them
    the second ones, whose inputs are computed when the first call has returned.
    """
    fused = experts.fused_experts(block)

    def linear(name: str, arguments: list[Any]) -> None:
        visit([Reached(name, arguments[0])])

    def both(name: str, arguments: list[Any]) -> None:
        module, (hidden, chosen) = fused[name], arguments[:2]
        first, second = experts.matrices(module)
        routed = experts.routed(module, hidden, chosen)
        visit([Reached(f"{name}.{e}.{first}", x, mine) for e, mine, x in routed])
        inner = (
            (e, mine, experts.inner(module, e, x))
            for e, mine, x in experts.routed(module, hidden, chosen)
        )
        visit([Reached(f"{name}.{e}.{second}", x, mine) for e, mine, x in inner])

    with watched(linear_layers(block), linear), watched(fused, both):
        yield


@contextmanager
def recorded_inputs(block: nn.Module, record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, call `record(name, x [tokens, in])` for every matrix that a forward reaches."""

    def visit(reached: list[Reached]) -> None:
        for name, x, _ in reached:
            record(name, x)

    with visited(block, visit):
        yield
