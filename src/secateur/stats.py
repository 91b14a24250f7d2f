"""What is remembered of a site's inputs: sums over tokens, so that parts of the work merge exactly.

Batches, devices, ranks and resumed runs each see some tokens; adding what they saw gives what one run
over all tokens would have seen. Every token weighs the same, whatever sequence it came from. Products are float32,
sums float64: then the order of adding does not show in the float32 mean, and two devices choose the masks of one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

STATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda x, dense: torch.stack([part.double().square().sum(0) for part in x.split(1024)]).sum(
        0
    ),  # [in] float64
    "gram": lambda x, dense: (x.T @ x).double(),  # [in, in] float64
    "cross": lambda x, dense: (dense.T @ x).double(),  # [in, in] float64
    "sum": lambda x, dense: x.double().sum(0),  # [in] float64
    "dense sum": lambda x, dense: dense.double().sum(0),  # [in] float64
}
"""Each statistic of inputs x `[tokens, in]`, float32: a tensor that adds over tokens.

`dense` are the inputs of the same tokens in the dense model; those in `OF_DENSE` alone read them.
"""
OF_DENSE = frozenset({"cross", "dense sum"})


@dataclass(frozen=True, eq=False)
class Stats:
    """Sums over the tokens that a site saw. `derived` keeps what was computed from them once."""

    tokens: int
    sums: Mapping[str, Tensor]
    derived: dict[object, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, x: Tensor, need: Iterable[str], dense: Tensor | None = None) -> "Stats":
        """The statistics `need` of inputs x `[tokens, in]`, any floating dtype; those `OF_DENSE` only with it."""
        x = x.float()
        other = x if dense is None else dense.float()
        return cls(len(x), {name: STATS[name](x, other) for name in need if name not in OF_DENSE or dense is not None})

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(
            self.tokens + other.tokens,
            {name: total + other.sums[name].to(total.device) for name, total in self.sums.items()},
        )

    def mean(self, name: str) -> Tensor:
        """A statistic divided by the number of tokens, float32."""
        return (self.sums[name] / self.tokens).float()

    def power(self) -> Tensor:
        """The mean square of every input, `[in]` float32, from whichever statistic has it."""
        return self.mean("square") if "square" in self.sums else self.mean("gram").diagonal()

    def once(self, key: object, compute: Callable[[], Value]) -> Value:
        """`compute()`, evaluated once for these statistics and shared by all sites that have them."""
        if key not in self.derived:
            self.derived[key] = compute()
        return self.derived[key]
