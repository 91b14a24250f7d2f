"""A causal LM as a stack of blocks that are run one at a time.

No adapter class per family. A `Shell` is the model with every block replaced by a tap: one forward
through it records what enters the first block and the arguments of each block's own call (masks,
rotary tables), and one more turns the last block's output into logits. Running the blocks with
those calls must equal `model(...)` bit for bit, which `load.replayable` checks.

Weights stay where they were mapped. `working_copy` converts one block at a time to the device and
dtype of the computation; the model itself is never converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModel


class Call(NamedTuple):
    """How the model calls one block, apart from the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def block_number(name: str, stack: str) -> int | None:
    """The number of the block in a stack that a parameter belongs to by its name, None for none."""
    number = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(number) if name.startswith(f"{stack}.") and number.isdecimal() else None


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM and where its blocks are. `tuples` says which blocks return a tuple; `spilled`,
    whether weights that the loader put together lie in a file rather than in memory; `ignored`
    names the tensors of its checkpoint that it did not take.
    """

    model: PreTrainedModel
    stack: str
    tuples: tuple[bool, ...]
    spilled: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.stack).children())

    @property
    def text_config(self) -> Any:
        """The configuration of the text, which may be a part of that of the model."""
        return self.model.config.get_text_config()

    def block_name(self, index: int) -> str:
        return f"{self.stack}.{index}"


def working_copy(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a block on `device`, in `dtype` (None: as stored); the original stays mapped."""
    return _cast(deepcopy(module), device, dtype)


def _cast(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, *, recurse: bool = True
) -> nn.Module:
    """Move a module; parameters take the dtype, buffers (rotary tables) only where it is wider."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        target = None
        if dtype and tensor.is_floating_point():
            wider = dtype.itemsize > tensor.dtype.itemsize
            target = dtype if wider or isinstance(tensor, nn.Parameter) else None
        tensor.data = tensor.data.to(device, target)
    return module


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden state `[batch, tokens, hidden]` after a block."""
    call = with_leaves(call, lambda leaf: _moved(leaf, hidden.device))
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def in_float32(call: Call) -> Call:
    """The call with its floating-point tensors (rotary tables, ALiBi, masks) in float32."""
    return with_leaves(call, lambda leaf: _moved(leaf, None, torch.float32))


def _moved(leaf: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device, dtype if leaf.is_floating_point() else None)


def with_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A recorded call with `change(leaf)` for whatever in it is no tuple, list or dict."""
    if isinstance(value, Call):
        return Call(*(with_leaves(part, change) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(with_leaves(part, change) for part in value)
    if isinstance(value, dict):
        return {key: with_leaves(part, change) for key, part in value.items()}
    return change(value)


class _Reached(Exception):
    """Ends a forward at the last tap; what follows it is not needed."""


class _Tap(nn.Module):
    """Stands in for a block: hands each call to the shell, and has the block's attributes."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.index = index
        self.called: Callable[[int, Tensor, Call], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.called is None:
            raise AssertionError("a tap was called outside enter() and leave()")
        hidden, *rest = args or [kwargs.pop("hidden_states")]
        return self.called(self.index, hidden, Call(tuple(rest), kwargs))


class Shell:
    """A language model without its blocks: what happens before the first and after the last.

    It runs on `device` with parameters in `dtype` (None: as stored). On the CPU the input embedding
    is never copied: the few rows that are looked up are converted. Without `head`, only `enter`
    works, and the output embedding stays mapped as well.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        head: bool = True,
    ) -> None:
        self.device, self.dtype, self.tuples = device, dtype, language_model.tuples
        self.taps = [_Tap(block, index) for index, block in enumerate(language_model.blocks)]
        embedding = language_model.model.get_input_embeddings()
        self.embedding = embedding if device.type == "cpu" else None
        output = None if head else language_model.model.get_output_embeddings()
        mapped = [module for module in (self.embedding, output) if module is not None]
        memo: dict[int, Any] = {id(tap.block): tap for tap in self.taps}
        memo |= {id(module): module for module in mapped}
        self.model = deepcopy(language_model.model, memo)
        for module in self.model.modules():
            if module not in mapped and not isinstance(module, _Tap):
                _cast(module, device, dtype, recurse=False)

    @contextmanager
    def _answering(self, answer: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """While open, every tap answers its call with `answer(index, hidden, call)`."""

        def called(index: int, hidden: Tensor, call: Call) -> Any:
            output = answer(index, hidden, call)
            return (output, None) if self.tuples[index] else output

        def convert(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return _looked_up(module, args[0], self.dtype) if self.dtype else output

        for tap in self.taps:
            tap.called = called
        try:
            with self.embedding.register_forward_hook(convert) if self.embedding else nullcontext():
                yield
        finally:
            for tap in self.taps:
                tap.called = None

    def enter(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """What enters block 0 for tokens `[batch, length]`, and the call of every block."""
        calls: list[Call] = []
        entering: list[Tensor] = []

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index != len(calls):
                raise UnsupportedModel(
                    f"Block {index} is called out of turn, after {len(calls)} others."
                )
            calls.append(call)
            entering.append(hidden)
            if len(calls) == len(self.taps):
                raise _Reached
            return hidden

        with self._answering(note):
            try:
                self.model(tokens.to(self.device), use_cache=False)
            except _Reached:
                return entering[0], calls
        raise UnsupportedModel(
            f"{type(self.model).__name__} called {len(calls)} of its {len(self.taps)} blocks."
        )

    def leave(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits `[batch, length, vocabulary]` for `hidden`, which the last block returned."""
        with self._answering(lambda index, entering, call: hidden.to(entering.device)):
            return self.model(tokens.to(self.device), use_cache=False).logits


def _looked_up(embedding: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """What an embedding gives in another dtype: only the rows that are looked up are converted.

    Its own forward runs on them, since some families scale the result.
    """
    rows, places = tokens.unique(return_inverse=True)
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    narrow = copy(embedding)
    narrow._parameters = {"weight": nn.Parameter(weight[rows].to(dtype), requires_grad=False)}
    narrow.padding_idx = None  # type: ignore[assignment]
    return narrow.forward(places)


def own(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of recorded calls, with one `memo` for a batch; only tensors are shared."""

    def copied(leaf: Any) -> Any:
        return leaf if isinstance(leaf, Tensor) else memo.setdefault(id(leaf), deepcopy(leaf))

    return with_leaves(value, copied)


def same(a: Any, b: Any) -> bool:
    """Whether two recorded calls are equal, tensors by value."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or (isinstance(a, (str, int, float, bool)) and a == b)


def close(wanted: Tensor, got: Tensor) -> bool:
    """Whether each channel (last dimension) differs by little of its norm, or of 1 % of the median.

    Little is 0.1 %, or a few roundings of a 16-bit dtype: a wrong order is far off.
    """
    rtol = max(1e-3, 4 * torch.finfo(wanted.dtype).eps)
    wanted, got = wanted.float().flatten(0, -2), got.float().flatten(0, -2)
    norm = wanted.norm(dim=0)
    return bool(((wanted - got).norm(dim=0) <= rtol * norm.clamp_min(0.01 * norm.median())).all())
