"""What a model is made of and what its blocks do, from the configuration alone: no weights, hence no numbers.

The model is built on torch's meta device, where a tensor has a shape and nothing in it, and one block of each kind is
run there on a batch of windows. What the run does is seen: which sites read the same input, the operations, and what
is alive at every site. So there is no table of families. Three things cannot be run without numbers and are answered
by rule: a question to a tensor (yes, as for windows without padding), attention (the fused kernel: no matrix of
scores, unless its widths differ) and experts (each sees its even share of the tokens).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secateur import experts
from secateur.cost import attention
from secateur.errors import UnsupportedModel, in_one_line
from secateur.model import Call, find_stack, run_block
from secateur.refusals import LOAD_ERRORS
from secateur.sites import coverage, sites
from secateur.trace import signature

META = torch.device("meta")


@dataclass(frozen=True)
class Read:
    """An input that sites of a block read: its width, and the outputs of each site by name.

    `share` of the tokens arrive: an expert sees some of them. Sites of one `group` are solved at the same moment, at
    which a batch has `live_bytes` within the block, beside the hidden state that entered it.
    """

    columns: int
    rows: dict[str, int]
    share: float
    group: str
    live_bytes: int


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: how many, the index of the first, and what that one is and does to one batch.

    `parameters`, of which `weights` are in matrices and `prunable` are sites'; `buffer_bytes`. `flops` of a forward,
    and `watch_flops` more where experts are watched;
    the bytes it allocates at most, `peak_bytes`, with the inputs of all sites held, `held_bytes`, and with everything
    that a backward pass needs, `tuning_bytes`. `unseen`: sites that the forward does not reach.
    """

    count: int
    first: int
    has_last: bool
    parameters: int
    weights: int
    prunable: int
    buffer_bytes: int
    reads: tuple[Read, ...]
    unseen: tuple[str, ...]
    flops: int
    watch_flops: int
    peak_bytes: int
    held_bytes: int
    tuning_bytes: int

    @property
    def groups(self) -> int:
        """How many groups of sites are solved one after another; unseen ones are a group too."""
        return len({read.group for read in self.reads}) + bool(self.unseen)


@dataclass(frozen=True)
class Outline:
    """A model: parameters, those in its blocks, kinds of block, and what a batch of windows brings along.

    `hidden_bytes` enter a block with a batch; `call_bytes` are the masks and rotary tables of its call; `entry`
    parameters outside the blocks are converted to embed a batch. `restacked` parameters are copied by the loader,
    since the checkpoint holds them in pieces.
    """

    architecture: str
    stack: str
    parameters: int
    in_blocks: int
    entry: int
    restacked: int
    names: tuple[str, ...]
    shapes: dict[str, tuple[int, int]]
    context: int | None
    kinds: tuple[Kind, ...]
    hidden_bytes: int
    call_bytes: int
    hidden: int


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM of a configuration on the meta device. Raises UnsupportedModel for an unknown architecture."""
    try:
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"transformers cannot build a {getattr(config, 'model_type', '?')!r} model from its configuration: "
            f"{in_one_line(error)}."
        ) from error
    return model.eval()


def outline(model: PreTrainedModel, batch: int, length: int, *, tuning: bool = False) -> Outline:
    """What a model on the meta device is, and does to a batch of windows; `tuning`: with a backward pass as well.

    Raises UnsupportedModel where a block cannot be run without numbers.
    """
    stack = find_stack(model)
    blocks = list(model.get_submodule(stack).children())
    alike: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        alike.setdefault(signature(block), []).append(index)
    try:
        calls = _calls(model, blocks, [indices[0] for indices in alike.values()], batch, length)
        kinds = tuple(
            _kind(blocks[indices[0]], *calls[indices[0]], indices, len(blocks) - 1 in indices, tuning)
            for indices in alike.values()
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedModel(
            f"A block of {type(model).__name__} cannot be run without numbers, so its cost is not known before the "
            f"run: {in_one_line(error)}."
        ) from error
    hidden = calls[0][0]
    held = {_storage(t)._cdata: t for _, call in calls.values() for t in tree_leaves(call) if _is_tensor(t)}
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    ends = {id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e for p in e.parameters()}
    inside = {id(p) for block in blocks for p in block.parameters()}
    return Outline(
        type(model).__name__,
        stack,
        parameters,
        in_blocks,
        sum(p.numel() for p in model.parameters() if id(p) not in ends | inside),
        _restacked(model),
        tuple(name for name, _ in model.named_parameters()),
        {f"{stack}.{index}.{name}": (site.weight.shape[0], site.weight.shape[1])
         for index, block in enumerate(blocks) for name, site in sites(block).items()},
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        kinds,
        hidden.nbytes,
        sum(_storage(t).nbytes() for t in held.values()),
        hidden.shape[-1],
    )  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _restacked(model: PreTrainedModel) -> int:
    """Parameters of fused experts, where transformers stacks them when it loads a checkpoint."""
    if not any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model)):
        return 0
    fused = (module for module in model.modules() if experts.is_experts(module))
    return sum(getattr(module, name).numel() for module in fused for name in experts.matrices(module))


class _Reached(Exception):
    """Ends a forward at the last block that is wanted."""


@torch.no_grad()
def _calls(
    model: PreTrainedModel, blocks: list[nn.Module], wanted: list[int], batch: int, length: int
) -> dict[int, tuple[Tensor, Call]]:
    """What enters the `wanted` blocks, and how they are called."""
    found: dict[int, tuple[Tensor, Call]] = {}

    def hook(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(kwargs)
            hidden, *rest = args or [named.pop("hidden_states")]
            found[index] = hidden, Call(tuple(rest), named)
            if len(found) == len(wanted):
                raise _Reached

        return note

    with _without_numbers(model), ExitStack() as hooks:
        for index in wanted:
            hooks.callback(blocks[index].register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        try:
            model(torch.zeros(batch, length, dtype=torch.long, device=META), use_cache=False)
        except _Reached:
            return found
    raise UnsupportedModel(f"{type(model).__name__} called {len(found)} of the {len(wanted)} blocks that are wanted.")


def _kind(block: nn.Module, hidden: Tensor, call: Call, indices: list[int], has_last: bool, tuning: bool) -> Kind:
    """One block run: freely, with the inputs of its sites held, and with a graph for the backward pass."""
    with torch.no_grad(), _without_numbers(block), _Live() as holding:
        _, reads = _run(block, hidden, call, holding, hold=True)
    with torch.no_grad(), _without_numbers(block) as rules, FlopCounterMode(display=False) as counter, _Live() as free:
        alive, _ = _run(block, hidden, call, free, hold=False)
    tuned = _Live()
    if tuning:
        with torch.enable_grad(), _without_numbers(block), tuned:
            run_block(block, hidden, call)
    reached = {name for read in reads for name in read.rows}
    covered, weights = coverage(block)
    return Kind(
        len(indices), indices[0], has_last, sum(p.numel() for p in block.parameters()), weights, covered,
        sum(b.nbytes for b in block.buffers()), tuple(replace(read, live_bytes=alive[read.group]) for read in reads),
        tuple(name for name in sites(block) if name not in reached), counter.get_total_flops() + rules.flops,
        rules.watching, free.peak, holding.peak, tuned.peak,
    )  # fmt: skip


def _run(block: nn.Module, hidden: Tensor, call: Call, live: _Live, *, hold: bool) -> tuple[dict[str, int], list[Read]]:
    """(what is alive when each group is reached, what the sites read).

    With `hold` the inputs that are read stay alive, as those do that a run looks at; an identity tells inputs apart
    only while they live, so without it none are told.
    """
    alive: dict[str, int] = {}
    seen: dict[tuple[int, int], tuple[Tensor, Read]] = {}
    of_experts: list[Read] = []
    held: list[Tensor] = []  # the inputs of experts

    def linear(name: str, rows: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive[name] = live.now
            if hold:
                _, read = seen.setdefault((id(x), x._version), (x, Read(x.shape[-1], {}, 1.0, name, 0)))
                read.rows[name] = rows

        return see

    def fused(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = _Experts.of(module, [*args, *kwargs.values()])
            for part, matrix in enumerate(experts.matrices(module)):
                alive[f"{name}.{matrix}"] = live.now + part * layer.inner_bytes
                held.append(hidden.new_empty(layer.tokens, layer.columns[part]) if hold else hidden)
                of_experts.extend(
                    Read(layer.columns[part], {f"{name}.{expert}.{matrix}": layer.rows[part]},
                         layer.tokens / layer.all_tokens / layer.count, f"{name}.{matrix}", 0)
                    for expert in range(layer.count)
                )  # fmt: skip

        return see

    known = sites(block)
    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if experts.is_experts(module):
                handle = module.register_forward_pre_hook(fused(name), with_kwargs=True)
            elif name in known:
                handle = module.register_forward_pre_hook(linear(name, known[name].weight.shape[0]))
            else:
                continue
            hooks.callback(handle.remove)
        run_block(block, hidden, call)
    return alive, [*(read for _, read in seen.values()), *of_experts]


@dataclass(frozen=True)
class _Experts:
    """What an experts module does with a batch: `tokens` are pairs of a token and one of its experts."""

    count: int
    all_tokens: int
    tokens: int
    columns: tuple[int, int]
    rows: tuple[int, int]
    itemsize: int

    @classmethod
    def of(cls, module: nn.Module, arguments: Sequence[Any]) -> _Experts:
        hidden, chosen = arguments[:2]
        shapes = [getattr(module, name).shape[1:] for name in experts.matrices(module)]
        if experts.is_transposed(module):
            shapes = [shape[::-1] for shape in shapes]
        (first_rows, first_columns), (second_rows, second_columns) = shapes
        tokens = hidden.numel() // hidden.shape[-1]
        return cls(
            experts.count(module), tokens, chosen.numel(), (first_columns, second_columns), (first_rows, second_rows),
            hidden.dtype.itemsize,
        )  # fmt: skip

    @property
    def inner_bytes(self) -> int:
        """The inputs of the second matrices."""
        return self.tokens * self.columns[1] * self.itemsize

    @property
    def flops(self) -> tuple[int, int]:
        """Operations of the first and the second matrices."""
        one, two = (2 * self.tokens * rows * columns for rows, columns in zip(self.rows, self.columns, strict=True))
        return one, two


class _Rules(TorchFunctionMode):
    """Answers what cannot be run without numbers; `flops` of that, and of what watching experts repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.watching = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            self.flops += attention(q.shape, k.shape, v.shape)
            scores = [q.new_empty(*q.shape[:-1], k.shape[-2]) for _ in range(2 * (q.shape[-1] != v.shape[-1]))]
            result = q.new_empty(*q.shape[:-1], v.shape[-1])
            scores.clear()
            return result
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func in _ANSWERS:
            return _ANSWERS[func]
        return func(*args, **kwargs)

    def experts(self, module: nn.Module) -> Callable[..., Tensor]:
        """A forward for an experts module that only allocates, as the products of sorted tokens do."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            layer = _Experts.of(module, [*args, *kwargs.values()])
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
def _without_numbers(module: nn.Module) -> Iterator[_Rules]:
    """While open, forwards of a module run on the meta device; the rules that answer for numbers."""
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


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive: `now`, and at most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _storage(tensor)._cdata) not in given | self._known:
                size = _storage(tensor).nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(_storage(tensor), self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
