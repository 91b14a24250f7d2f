"""Running a module on torch's meta device, where a tensor has a shape and nothing in it.

Three things cannot be run without numbers and are answered by rule: a question to a tensor (yes, as
for windows without padding), attention (the fused kernel: no matrix of scores, unless its widths
differ) and experts (each sees its even share of the tokens).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.models import experts

META = torch.device("meta")


class ExpertLayer(NamedTuple):
    """What a module of fused experts does with a batch.

    There are `number` of them. `shapes` are the `[out, in]` of an expert's two matrices, `tokens`
    the pairs of a token and one of its experts, `share` the part of the batch that one expert sees.
    """

    shapes: list[tuple[int, int]]
    number: int
    tokens: int
    share: float
    itemsize: int

    @classmethod
    def of(cls, module: nn.Module, arguments: Sequence[Any]) -> ExpertLayer:
        """Read from the module and the arguments of its call."""
        hidden, chosen = arguments[:2]
        shapes = [getattr(module, name).shape[1:] for name in experts.matrices(module)]
        if experts.is_transposed(module):
            shapes = [shape[::-1] for shape in shapes]
        number, tokens = experts.count(module), chosen.numel()
        share = tokens / (hidden.numel() // hidden.shape[-1]) / number
        return cls([(out, into) for out, into in shapes], number, tokens, share, hidden.itemsize)

    @property
    def inner_bytes(self) -> int:
        """Bytes of the inputs of the second matrices."""
        return self.tokens * self.shapes[1][1] * self.itemsize

    @property
    def flops(self) -> list[int]:
        """Operations of the first and of the second matrices."""
        return [2 * self.tokens * rows * columns for rows, columns in self.shapes]


def attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Operations of attention, scores and sums; shapes `[batch, heads, tokens, width]`."""
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * k[-2] * (width + v[-1])


class Rules(TorchFunctionMode):
    """Answers what cannot be run without numbers.

    `flops` are the operations of what was answered, `watching` those that are repeated where the
    inputs of experts are looked at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.watching = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")[len(args) :]
            return self._attend(*[*args, *(kwargs[name] for name in names)][:3])
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func in _ANSWERS:
            return _ANSWERS[func]
        return func(*args, **kwargs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.flops += attention(q.shape, k.shape, v.shape)
        matrices = 2 if q.shape[-1] != v.shape[-1] else 0
        scores = [q.new_empty(*q.shape[:-1], k.shape[-2]) for _ in range(matrices)]
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        scores.clear()  # they live until the result is there
        return result

    def experts(self, module: nn.Module) -> Callable[..., Tensor]:
        """A forward for experts that only allocates, as the products of sorted tokens do."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            layer = ExpertLayer.of(module, [*args, *kwargs.values()])
            self.flops += sum(layer.flops)
            self.watching += layer.flops[0]
            hidden: Tensor = [*args, *kwargs.values()][0]
            widths = [into for _, into in layer.shapes] + [out for out, _ in layer.shapes]
            waiting = [hidden.new_empty(layer.tokens, width) for width in widths]
            result = torch.empty_like(hidden)
            waiting.clear()
            return result

        return forward


_ANSWERS: dict[Any, Any] = {Tensor.__bool__: True, Tensor.__contains__: False, Tensor.item: 0}


@contextmanager
def without_numbers(module: nn.Module) -> Iterator[Rules]:
    """While open, a module runs on the meta device; gives the rules that answer for numbers."""
    rules = Rules()
    fused = experts.fused_experts(module).values()
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
            if not isinstance(tensor, Tensor):
                continue
            memory = storage(tensor)
            key, size = memory._cdata, memory.nbytes()
            if key not in given | self._known:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def storage(tensor: Tensor) -> torch.UntypedStorage:
    """The memory that a tensor is a view of."""
    return tensor.untyped_storage()
