"""Where each output channel of a block's weight matrices arrives, found by tracing.

NaN is put into one output channel of one weight matrix, and one looks where it arrives: at which
inputs of which matrices, or at the block's output. NaN passes through every activation, product and
softmax, and never turns back into a number, so it arrives wherever the channel could matter. It
stops at the first matrix that it reaches. Item c of a batch carries the NaN of channel c, so that
one forward traces a whole chunk of channels.

What has parameters but is no such matrix, a norm for one, is traced as well: its channels stay
where they are, and tell apart what they feed. Yet NaN says that a channel arrives, not how: a
vector of scales that is no module of its own, or a short convolution, is not seen. Whoever moves
channels must compare numbers afterwards (`permute.verified`).
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.models import experts
from secateur.models.hooks import watched
from secateur.models.matrices import linear_layers, weight_matrices
from secateur.models.replay import Call, LanguageModel, Shell, run_block, working_copy

TOKENS = 2
"""Tokens of a batch item: two, so that attention has something to mix."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Where the outputs of a block's weight matrices arrive first.

    `reach`: for every (producer, consumer) that meet, which output channel arrives at which input,
    bool `[out, in]`. `leaks`: for every weight matrix, the channels that arrive elsewhere than at
    one, bool `[out]`: in the block's output, in a router, or where they cannot be followed.
    `direct`: the consumers that see the block's own input. A producer without `leaks` is no weight
    matrix (a norm, say) but stands between one and the consumer.
    """

    reach: Mapping[tuple[str, str], Tensor]
    leaks: Mapping[str, Tensor]
    direct: frozenset[str]

    def elsewhere(self, producer: str, consumer: str) -> Tensor:
        """The channels of a producer that arrive elsewhere than at this consumer, `[out]`."""
        channels = self.leaks[producer].clone()
        for (source, other), reach in self.reach.items():
            if source == producer and other != consumer:
                channels |= reach.any(1)
        return channels


@torch.no_grad()
def trace(
    language_model: LanguageModel,
    index: int,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 256,
) -> Trace:
    """Trace every output channel of every weight matrix of a block. `dtype` None: as stored.

    Costs about (outputs of all matrices) x 2 tokens through the block: 85 thousand for Llama 2 7B,
    less than one pass of calibration through one block (128 x 2048). `batch` channels are traced at
    a time. The matrices take (out x in) bytes: 121 MB each for the gate and the up matrix of that
    model. Experts of a module share one.
    """
    device = device or torch.device("cpu")
    tokens = torch.ones(batch, TOKENS, dtype=torch.long)
    block, hidden, call = entering(language_model, index, tokens, device, dtype)
    poison = _Poison(block, batch)
    reach: dict[tuple[str, str], Tensor] = {}
    leaks: dict[str, Tensor] = {}

    def forward() -> Tensor:
        return run_block(block, hidden, call)

    def all_poisoned() -> Tensor:
        return run_block(block, torch.full_like(hidden, torch.nan), call)

    with poison.hooked(), sdpa_kernel(SDPBackend.MATH):  # a fused kernel might drop a NaN
        direct, _ = poison.run(all_poisoned, call, None)
        for producer, outputs in [*poison.outputs.items(), *poison.between(forward, call, direct)]:
            lost = torch.zeros(outputs, dtype=torch.bool)
            for start in range(0, outputs, batch):
                part = range(start, min(start + batch, outputs))
                arrived, missed = poison.run(forward, call, producer, part)
                lost[start : part.stop] = missed[: len(part)]
                for consumer, inputs in arrived.items():
                    none = torch.zeros(outputs, inputs.shape[1], dtype=torch.bool)
                    whole = reach.setdefault((producer, consumer), none)
                    whole[start : part.stop] = inputs[: len(part)]
            if producer in poison.outputs:
                leaks[producer] = lost
    return _with_experts(block, Trace(reach, leaks, frozenset(direct)), batch)


@torch.no_grad()
def entering(
    language_model: LanguageModel,
    index: int,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, Tensor, Call]:
    """A copy of a block, what enters it for tokens `[batch, length]`, and its call.

    The blocks before it are run: a block may need keys and values that another left in its call.
    """
    hidden, calls = Shell(language_model, device, dtype, head=False).enter(tokens)
    for block, call in zip(language_model.blocks[:index], calls[:index], strict=True):
        hidden = run_block(working_copy(block, device, dtype), hidden, call)
    return working_copy(language_model.blocks[index], device, dtype), hidden, calls[index]


def _with_experts(block: nn.Module, traced: Trace, batch: int) -> Trace:
    """The trace with the matrices of every expert, and the way from its first one to its second.

    An expert's matrices are no modules, so the forward traced the experts module as a whole.
    Between the two matrices there is only the gate, the same for all experts.
    """
    reach, leaks, direct = dict(traced.reach), dict(traced.leaks), set(traced.direct)
    for name, module in experts.fused_experts(block).items():
        first, second = (
            [f"{name}.{expert}.{part}" for expert in range(experts.count(module))]
            for part in experts.matrices(module)
        )
        for producer, consumer in list(reach):
            if name in (producer, consumer):
                arrives = reach.pop((producer, consumer))
                sources = second if producer == name else [producer]
                targets = first if consumer == name else [consumer]
                reach |= dict.fromkeys(product(sources, targets), arrives)
        if name in direct:
            direct = direct - {name} | set(first)
        gate = _through_gate(module, batch)
        reach |= dict.fromkeys(zip(first, second, strict=True), gate)
        leaks |= dict.fromkeys(first, torch.zeros(len(gate), dtype=torch.bool))
        # A norm after the experts: what they give is no longer the matrix's output.
        lost = leaks.pop(name) | getattr(module, "has_post_expert_norm", False)
        leaks |= dict.fromkeys(second, lost)
    return Trace(reach, leaks, frozenset(direct))


def _through_gate(module: nn.Module, batch: int) -> Tensor:
    """Which output of an expert's first matrix arrives at which input of its second."""
    first, _ = experts.matrices(module)
    weight, outputs = getattr(module, first), experts.outputs(module, first)
    parts = []
    for start in range(0, outputs, batch):
        z = weight.new_zeros(min(batch, outputs - start), outputs)
        z.diagonal(start).fill_(torch.nan)
        parts.append(experts.activated(module, z).isnan().cpu())
    return torch.cat(parts)


class _Poison:
    """Hooks that put NaN into what one matrix returns, stop it at the next, and note where."""

    def __init__(self, block: nn.Module, batch: int) -> None:
        self.block, self.batch = block, batch
        fused, linear = experts.fused_experts(block), linear_layers(block)
        matrices = weight_matrices(block)
        self.modules: dict[str, nn.Module] = {**fused, **linear}
        self.outputs = {name: experts.outputs(m, "down_proj") for name, m in fused.items()}
        self.outputs |= {name: matrices[name].weight.shape[0] for name in linear}
        others = experts.routers(block) | set(self.modules.values())
        self.others = {
            name: module
            for name, module in block.named_modules()
            if module not in others and any(p.numel() > 1 for p in module.parameters(recurse=False))
        }
        self.width = 0

    def run(
        self,
        forward: Callable[[], Tensor],
        call: Call,
        producer: str | None,
        part: range | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs that NaN reached, `[batch, in]` by consumer; items that lost theirs, `[batch]`).

        The NaN is in output channel `part[c]` of item c, or in all channels of all items.
        """
        self.producer, self.part = producer, part
        self.arrived: dict[str, Tensor] = {}
        self.lost = torch.zeros(self.batch, dtype=torch.bool)
        self.spoken = producer is None
        self._lose(forward())
        if not self.spoken:
            self.lost[:] = True  # the weight is read without calling its module
        for tensor in _left_behind(call):
            if tensor.dim() and len(tensor) == self.batch:
                self.lost |= tensor.isnan().flatten(1).any(1).cpu()
        return self.arrived, self.lost

    def between(
        self, forward: Callable[[], Tensor], call: Call, direct: Container[str]
    ) -> Iterator[tuple[str, int]]:
        """(name, outputs) of what has parameters and stands between two weight matrices."""
        for name in self.others:
            arrived, _ = self.run(forward, call, name)
            if any(consumer not in direct for consumer in arrived):
                yield name, self.width

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, forwards of the block are poisoned."""
        routers = {str(number): m for number, m in enumerate(experts.routers(self.block))}
        with ExitStack() as hooks:
            hooks.enter_context(watched(routers, lambda name, inputs: self._lose(inputs[0])))
            hooks.enter_context(watched(self.modules, self._entered))
            for name, module in (self.modules | self.others).items():
                hooks.enter_context(module.register_forward_hook(self._returned(name)))
            yield

    def _entered(self, name: str, inputs: list[Any]) -> None:
        bad = inputs[0].isnan()
        if bad.any() and (items := self._items(bad)) is not None:
            items = items.any(2).any(0).cpu()  # [batch, in]
            self.arrived[name] = self.arrived.get(name, torch.zeros_like(items)) | items
        elif bad.any():
            self.lost[:] = True

    def _returned(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.spoken |= name == self.producer
            if name not in self.modules and name != self.producer:
                return output
            if not isinstance(output, Tensor):
                self.lost[:] = True
                return output
            output = output.where(~output.isnan(), 0.0) if name in self.modules else output
            return self._poisoned(output) if name == self.producer else output

        return hook

    def _poisoned(self, output: Tensor) -> Tensor:
        """What the producer returned, with NaN put in."""
        output = output.clone(memory_format=torch.contiguous_format)
        self.width = output.shape[-1]
        if (items := self._items(output)) is None:
            self.lost[:] = True
        elif self.part is None:
            items.fill_(torch.nan)
        else:
            channels = torch.arange(len(self.part), device=output.device)
            items[:, channels, :, self.part.start + channels] = torch.nan
        return output

    def _lose(self, x: Tensor) -> None:
        """Note the items with a NaN in x, which enters no matrix; all where that is unclear."""
        items = self._items(x.isnan())
        if items is not None:
            self.lost |= items.any(3).any(2).any(0).cpu()
        elif x.isnan().any():
            self.lost[:] = True

    def _items(self, x: Tensor) -> Tensor | None:
        """x as `[streams, batch, tokens, width]`, a view if contiguous; None for another layout."""
        sizes = [size for size in x.shape[:-1] if size != 1]
        if sizes[-2:] != [self.batch, TOKENS] and sizes != [self.batch * TOKENS]:
            return None
        return x.reshape(-1, self.batch, TOKENS, x.shape[-1])


def _left_behind(value: Any) -> Iterator[Tensor]:
    """The tensors in a call: a block may leave something there, in a mapping, for a later one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _left_behind(part)
