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
    "square": lambda x, dense: _summed(x.square()),  # [in]
    "gram": lambda x, dense: x.T @ x,  # [in, in]
    "cross": lambda x, dense: dense.T @ x,  # [in, in]
    "sum": lambda x, dense: _summed(x),  # [in]
    "dense sum": lambda x, dense: _summed(dense),  # [in]
}
"""Each statistic of inputs x `[tokens, in]`, float32: a tensor that adds over tokens, in float64.

`dense` are the inputs of the same tokens in the dense model; those in `OF_DENSE` alone read them.
"""


def _summed(x: Tensor) -> Tensor:
    """The sum over tokens: float32 for a thousand at a time, float64 over these."""
    return torch.stack([part.sum(0) for part in x.split(1024)]).double().sum(0)


OF_DENSE = frozenset({"cross", "dense sum"})


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf: one sum, and a closer look only where that is not finite."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


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
        found = {name: STATS[name](x, other) for name in need if name not in OF_DENSE or dense is not None}
        return cls(len(x), {name: value.double() for name, value in found.items()})

    def add(self, x: Tensor, need: Iterable[str], dense: Tensor | None = None) -> "Stats":
        """These and those of inputs x `[tokens, in]`, in the same memory: the ones before are no more."""
        x = x.float()
        other = x if dense is None else dense.float()
        for name in need:
            if name not in OF_DENSE or dense is not None:
                self.sums[name].add_(STATS[name](x, other))
        return Stats(self.tokens + len(x), self.sums)

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
