"""What is remembered of the inputs of a weight matrix: sums over tokens, which add exactly.

Batches, devices, ranks and resumed runs each see some tokens; adding what they saw gives what one
run over all tokens would have seen. Every token weighs the same, whatever sequence it came from.
Products are float32, sums float64: then the order of adding does not show in the float32 mean, and
two devices choose the masks of one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.kernels.gram import add_products, add_squares, summed

Value = TypeVar("Value")

STATS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "square": lambda total, x, dense: add_squares(total, x),  # [in]
    "gram": lambda total, x, dense: add_products(total, x, x),  # [in, in]
    "cross": lambda total, x, dense: add_products(total, dense, x),  # [in, in]
    "sum": lambda total, x, dense: total.add_(summed(x.float())),  # [in]
    "dense sum": lambda total, x, dense: total.add_(summed(dense.float())),  # [in]
}
"""Each statistic of inputs x `[tokens, in]`: what adds those of some tokens to a total in float64.

`dense`: inputs of the same tokens in the dense model, same dtype; only `OF_DENSE` read them.
"""
MATRICES = frozenset({"gram", "cross"})
"""The statistics that are `[in, in]`."""
OF_DENSE = frozenset({"cross", "dense sum"})


@dataclass(frozen=True, eq=False)
class Stats:
    """Sums over the tokens that a weight matrix saw; `derived` caches what is made of them."""

    tokens: int
    sums: Mapping[str, Tensor]
    derived: dict[object, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, x: Tensor, need: Iterable[str], dense: Tensor | None = None) -> "Stats":
        """The statistics `need` of inputs x `[tokens, in]`, in any floating-point dtype."""
        known = [name for name in need if name not in OF_DENSE or dense is not None]
        shapes = {name: x.shape[1:] * (2 if name in MATRICES else 1) for name in known}
        zeros = partial(torch.zeros, dtype=torch.float64, device=x.device)
        return cls(0, {name: zeros(shape) for name, shape in shapes.items()}).add(x, known, dense)

    def add(self, x: Tensor, need: Iterable[str], dense: Tensor | None = None) -> "Stats":
        """These plus those of inputs x `[tokens, in]`, added in place: the old sums are gone."""
        for name in need:
            if name not in OF_DENSE or dense is not None:
                STATS[name](self.sums[name], x, x if dense is None else dense)
        return Stats(self.tokens + len(x), self.sums)

    def __add__(self, other: "Stats") -> "Stats":
        sums = self.sums.items()
        both = {name: total + other.sums[name].to(total.device) for name, total in sums}
        return Stats(self.tokens + other.tokens, both)

    def mean(self, name: str) -> Tensor:
        """A statistic divided by the number of tokens, float32."""
        return (self.sums[name] / self.tokens).float()

    def power(self) -> Tensor:
        """The mean square of every input, `[in]` float32, from whichever statistic has it."""
        return self.mean("square") if "square" in self.sums else self.mean("gram").diagonal()

    def once(self, key: object, compute: Callable[[], Value]) -> Value:
        """`compute()`, done once for these statistics and shared by all matrices that have them."""
        if key not in self.derived:
            self.derived[key] = compute()
        return self.derived[key]
