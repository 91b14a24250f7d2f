"""What a model is made of and what its blocks do, from the configuration alone: no weights, hence
no numbers.

The model is built on torch's meta device, where a tensor has a shape and nothing in it, and one
block of each kind is run there on a batch of windows. What the run does is seen: which weight
matrices read the same input, the operations, and what is alive at every matrix. So there is no
table of families; meta.py says what is answered by rule.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secateur.errors import UnsupportedModel, in_one_line
from secateur.models import experts
from secateur.models.checks import LOAD_ERRORS
from secateur.models.hooks import watched
from secateur.models.load import find_stack
from secateur.models.matrices import linear_layers, signature, weight_matrices
from secateur.models.parts import loader
from secateur.models.replay import Call, LanguageModel, run_block
from secateur.pruning.planning.meta import META, ExpertLayer, Live, storage, without_numbers


@dataclass(frozen=True)
class Read:
    """An input that weight matrices of a block read: its width, and the outputs of each by name.

    `share` of the tokens arrive: an expert sees some of them. The matrices of one `group` are
    solved at the same moment, at which a batch has `live_bytes` within the block, beside the hidden
    state that entered it.
    """

    columns: int
    rows: dict[str, int]
    share: float
    group: str
    live_bytes: int = 0


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: how many, and what the first, of that name, is and does to one batch.

    `flops` of a forward, and `watch_flops` more where experts are watched; the bytes it allocates
    at most, `peak_bytes`, with the inputs of all matrices held, `held_bytes`, and with everything
    that a backward pass needs, `tuning_bytes`. `unseen`: matrices that the forward does not reach.
    `has_last`: the model's last block is one of them.
    """

    count: int
    name: str
    has_last: bool
    parameters: int
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
        """How many groups of matrices are solved one after another; unseen ones are a group too."""
        return len({read.group for read in self.reads}) + bool(self.unseen)


@dataclass(frozen=True)
class Outline:
    """The kinds of block of a model, and what a batch of windows brings along: `hidden_bytes` enter
    a block with it, `call_bytes` are the masks and rotary tables of the block's call.
    """

    kinds: tuple[Kind, ...]
    hidden_bytes: int
    call_bytes: int


def build(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> LanguageModel:
    """The model of a configuration on the meta device; UnsupportedModel for an unknown one."""
    try:
        with META:
            model = loader(config).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"transformers cannot build a {getattr(config, 'model_type', '?')!r} model from its "
            f"configuration: {in_one_line(error)}."
        ) from error
    return LanguageModel(model.eval(), find_stack(model), ())


def outline(built: LanguageModel, batch: int, length: int, *, tuning: bool = False) -> Outline:
    """What the blocks of a model on the meta device do to `batch` windows of `length` tokens.

    `tuning`: with a backward pass. Raises UnsupportedModel where a block cannot be run without
    numbers.
    """
    alike: dict[Any, list[int]] = {}
    for index, block in enumerate(built.blocks):
        alike.setdefault(signature(block), []).append(index)
    try:
        calls = _calls(built, [indices[0] for indices in alike.values()], batch, length)
        kinds = tuple(
            _kind(built, indices, *calls[indices[0]], tuning=tuning) for indices in alike.values()
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"A block of {type(built.model).__name__} cannot be run without numbers, so its cost "
            f"is not known before the run: {in_one_line(error)}."
        ) from error
    tensors = [
        leaf for _, call in calls.values() for leaf in tree_leaves(call) if isinstance(leaf, Tensor)
    ]
    call_bytes = {storage(tensor)._cdata: storage(tensor).nbytes() for tensor in tensors}
    return Outline(kinds, calls[0][0].nbytes, sum(call_bytes.values()))


def restacked(built: LanguageModel) -> int:
    """Parameters of fused experts that the loader puts together from pieces in the checkpoint."""
    rules = get_model_conversion_mapping(built.model)
    if not any(isinstance(rule, WeightConverter) for rule in rules):
        return 0
    fused = experts.fused_experts(built.model).values()
    return sum(
        getattr(module, name).numel() for module in fused for name in experts.matrices(module)
    )


class _Reached(Exception):
    """Ends a forward at the last block that is wanted."""


@torch.no_grad()
def _calls(
    built: LanguageModel, wanted: list[int], batch: int, length: int
) -> dict[int, tuple[Tensor, Call]]:
    """What enters the `wanted` blocks, and how they are called."""
    calls: dict[int, tuple[Tensor, Call]] = {}

    def note(index: int, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden, *rest = args or [named.pop("hidden_states")]
        calls[index] = hidden, Call(tuple(rest), named)
        if len(calls) == len(wanted):
            raise _Reached

    blocks = built.blocks
    with without_numbers(built.model), ExitStack() as hooks:
        for index in wanted:
            see = partial(note, index)
            hooks.enter_context(blocks[index].register_forward_pre_hook(see, with_kwargs=True))
        try:
            built.model(torch.zeros(batch, length, dtype=torch.long, device=META), use_cache=False)
        except _Reached:
            return calls
    raise UnsupportedModel(
        f"{type(built.model).__name__} called {len(calls)} of the {len(wanted)} blocks that are "
        "wanted."
    )


def _kind(
    built: LanguageModel, indices: Sequence[int], hidden: Tensor, call: Call, *, tuning: bool
) -> Kind:
    """Run the first of the blocks that are alike: with the inputs of its matrices held, freely, and
    with a graph for the backward pass.
    """
    block = built.blocks[indices[0]]
    holding, free, tuned = Live(), Live(), Live()
    with torch.no_grad(), without_numbers(block), holding:
        _, reads = _run(block, hidden, call, holding, hold=True)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), without_numbers(block) as rules, counter, free:
        alive, _ = _run(block, hidden, call, free, hold=False)
    if tuning:
        with torch.enable_grad(), without_numbers(block), tuned:
            run_block(block, hidden, call)
    reached = {name for read in reads for name in read.rows}
    return Kind(
        count=len(indices),
        name=built.block_name(indices[0]),
        has_last=len(built.blocks) - 1 in indices,
        parameters=sum(p.numel() for p in block.parameters()),
        buffer_bytes=sum(b.nbytes for b in block.buffers()),
        reads=tuple(replace(read, live_bytes=alive[read.group]) for read in reads),
        unseen=tuple(name for name in weight_matrices(block) if name not in reached),
        flops=counter.get_total_flops() + rules.flops,
        watch_flops=rules.watching,
        peak_bytes=free.peak,
        held_bytes=holding.peak,
        tuning_bytes=tuned.peak,
    )


def _run(
    block: nn.Module, hidden: Tensor, call: Call, live: Live, *, hold: bool
) -> tuple[dict[str, int], list[Read]]:
    """(what is alive when each group is reached, what the matrices read).

    With `hold` the inputs that are read stay alive, as when a run looks at them, and the second is
    filled: only while they live do identities tell inputs apart.
    """
    alive: dict[str, int] = {}
    dense: dict[tuple[int, int], Read] = {}
    of_experts: list[Read] = []
    inputs: list[Tensor] = []
    known, modules = weight_matrices(block), experts.fused_experts(block)

    def linear(name: str, arguments: list[Any]) -> None:
        x = arguments[0]
        alive[name] = live.now
        if hold:
            inputs.append(x)
            read = dense.setdefault((id(x), x._version), Read(x.shape[-1], {}, 1.0, name))
            read.rows[name] = known[name].weight.shape[0]

    def fused(name: str, arguments: list[Any]) -> None:
        layer = ExpertLayer.of(modules[name], arguments)
        for part, matrix in enumerate(experts.matrices(modules[name])):
            group, (rows, columns) = f"{name}.{matrix}", layer.shapes[part]
            alive[group] = live.now + part * layer.inner_bytes
            if hold:
                inputs.append(hidden.new_empty(layer.tokens, columns))
                of_experts.extend(
                    Read(columns, {f"{name}.{expert}.{matrix}": rows}, layer.share, group)
                    for expert in range(layer.number)
                )

    with watched(linear_layers(block), linear), watched(modules, fused):
        run_block(block, hidden, call)
    return alive, [*dense.values(), *of_experts]
