"""Running a module on torch's meta device, where a tensor has a shape and nothing in it.

Three things cannot be run without numbers and are answered by rule: a question to a tensor (yes, as
for windows without padding), attention (the fused kernel: no matrix of scores, unless its widths
differ) and experts (each sees its even share of the tokens).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.models import experts
from secateur.pruning.planning.passes import attention

META = torch.device("meta")


@dataclass(frozen=True)
class ExpertLayer:
    """What an experts module does with a batch: `tokens` are pairs of a token and one of its
    experts.
    """

    count: int
    all_tokens: int
    tokens: int
    columns: tuple[int, int]
    rows: tuple[int, int]
    itemsize: int

    @classmethod
    def of(cls, module: nn.Module, arguments: Sequence[Any]) -> ExpertLayer:
        hidden, chosen = arguments[:2]
        shapes = [getattr(module, name).shape[1:] for name in experts.matrices(module)]
        if experts.is_transposed(module):
            shapes = [shape[::-1] for shape in shapes]
        (first_rows, first_columns), (second_rows, second_columns) = shapes
        tokens = hidden.numel() // hidden.shape[-1]
        return cls(
            experts.count(module),
            tokens,
            chosen.numel(),
            (first_columns, second_columns),
            (first_rows, second_rows),
            hidden.dtype.itemsize,
        )

    @property
    def inner_bytes(self) -> int:
        """The inputs of the second matrices."""
        return self.tokens * self.columns[1] * self.itemsize

    @property
    def flops(self) -> tuple[int, int]:
        """Operations of the first and the second matrices."""
        one, two = (
            2 * self.tokens * rows * columns
            for rows, columns in zip(self.rows, self.columns, strict=True)
        )
        return one, two


class _Rules(TorchFunctionMode):
    """Answers what cannot be run without numbers; `flops` of that, and of what watching experts
    repeats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.watching = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[
                :3
            ]
            self.flops += attention(q.shape, k.shape, v.shape)
            scores = [
                q.new_empty(*q.shape[:-1], k.shape[-2])
                for _ in range(2 * (q.shape[-1] != v.shape[-1]))
            ]
            result = q.new_empty(*q.shape[:-1], v.shape[-1])
            scores.clear()
            return result
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func in _ANSWERS:
            return _ANSWERS[func]
        return func(*args, **kwargs)

    def experts(self, module: nn.Module) -> Callable[..., Tensor]:
        """A forward for an experts module that only allocates, as the products of sorted tokens
        do.
        """

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            layer = ExpertLayer.of(module, [*args, *kwargs.values()])
            self.flops += sum(layer.flops)
            self.watching += layer.flops[0]
            hidden: Tensor = [*args, *kwargs.values()][0]
            widths = (*layer.columns, *layer.rows)
            held = [hidden.new_empty(layer.tokens, width) for width in widths]
            result = torch.empty_like(hidden)
            held.clear()
            return result

        return forward


_ANSWERS: dict[Any, Any] = {Tensor.__bool__: True, Tensor.__contains__: False, Tensor.item: 0}


@contextmanager
def without_numbers(module: nn.Module) -> Iterator[_Rules]:
    """While open, forwards of a module run on the meta device; the rules that answer for
    numbers.
    """
    rules = _Rules()
    fused = [part for part in module.modules() if experts.is_experts(part)]
    try:
        for part in fused:
            part.forward = rules.experts(part)  # type: ignore[method-assign]
        with META, rules:
            yield rules
    finally:
        for part in fused:
            del part.forward


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive: `now`, and at most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (key := storage(tensor)._cdata) not in given | self._known
            ):
                size = storage(tensor).nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage(tensor), self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def storage(tensor: Tensor) -> torch.UntypedStorage:
    """The memory that a tensor is a view of."""
    return tensor.untyped_storage()
