"""What a model is made of and what its blocks do, from the configuration alone: no weights, hence
no numbers.

The model is built on torch's meta device, where a tensor has a shape and nothing in it, and one
block of each kind is run there on a batch of windows. What the run does is seen: which sites read
the same input, the operations, and what is alive at every site. So there is no table of families;
meta.py says what is answered by rule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secateur.errors import UnsupportedModel, in_one_line
from secateur.models import experts
from secateur.models.checks import LOAD_ERRORS
from secateur.models.load import find_stack
from secateur.models.matrices import coverage, signature, weight_matrices
from secateur.models.replay import Call, run_block
from secateur.pruning.planning.meta import META, ExpertLayer, Live, storage, without_numbers


@dataclass(frozen=True)
class Read:
    """An input that sites of a block read: its width, and the outputs of each site by name.

    `share` of the tokens arrive: an expert sees some of them. Sites of one `group` are solved at
    the same moment, at which a batch has `live_bytes` within the block, beside the hidden state
    that entered it.
    """

    columns: int
    rows: dict[str, int]
    share: float
    group: str
    live_bytes: int


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: how many, the index of the first, and what that one is and does to one
    batch.

    `parameters`, of which `weights` are in matrices and `prunable` are sites'; `buffer_bytes`.
    `flops` of a forward, and `watch_flops` more where experts are watched; the bytes it allocates
    at most, `peak_bytes`, with the inputs of all sites held, `held_bytes`, and with everything that
    a backward pass needs, `tuning_bytes`. `unseen`: sites that the forward does not reach.
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
    """A model: parameters, those in its blocks, kinds of block, and what a batch of windows brings
    along.

    `hidden_bytes` enter a block with a batch; `call_bytes` are the masks and rotary tables of its
    call; `entry` parameters outside the blocks are converted to embed a batch. `restacked`
    parameters are copied by the loader, since the checkpoint holds them in pieces.
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
    """The causal LM of a configuration on the meta device. Raises UnsupportedModel for an unknown
    architecture.
    """
    try:
        with META:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"transformers cannot build a {getattr(config, 'model_type', '?')!r} model from its configuration: "
            f"{in_one_line(error)}."
        ) from error
    return model.eval()


def outline(model: PreTrainedModel, batch: int, length: int, *, tuning: bool = False) -> Outline:
    """What a model on the meta device is, and does to a batch of windows; `tuning`: with a backward
    pass as well.

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
            _kind(
                blocks[indices[0]], *calls[indices[0]], indices, len(blocks) - 1 in indices, tuning
            )
            for indices in alike.values()
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"A block of {type(model).__name__} cannot be run without numbers, so its cost is not known before the "
            f"run: {in_one_line(error)}."
        ) from error
    hidden = calls[0][0]
    held = {
        storage(t)._cdata: t
        for _, call in calls.values()
        for t in tree_leaves(call)
        if isinstance(t, Tensor)
    }
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    ends = {
        id(p)
        for e in (model.get_input_embeddings(), model.get_output_embeddings())
        if e
        for p in e.parameters()
    }
    inside = {id(p) for block in blocks for p in block.parameters()}
    return Outline(
        type(model).__name__,
        stack,
        parameters,
        in_blocks,
        sum(p.numel() for p in model.parameters() if id(p) not in ends | inside),
        _restacked(model),
        tuple(name for name, _ in model.named_parameters()),
        {
            f"{stack}.{index}.{name}": (site.weight.shape[0], site.weight.shape[1])
            for index, block in enumerate(blocks)
            for name, site in weight_matrices(block).items()
        },
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        kinds,
        hidden.nbytes,
        sum(storage(t).nbytes() for t in held.values()),
        hidden.shape[-1],
    )


def _restacked(model: PreTrainedModel) -> int:
    """Parameters of fused experts, where transformers stacks them when it loads a checkpoint."""
    if not any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model)):
        return 0
    fused = (module for module in model.modules() if experts.is_experts(module))
    return sum(
        getattr(module, name).numel() for module in fused for name in experts.matrices(module)
    )


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

    with without_numbers(model), ExitStack() as hooks:
        for index in wanted:
            hooks.callback(
                blocks[index].register_forward_pre_hook(hook(index), with_kwargs=True).remove
            )
        try:
            model(torch.zeros(batch, length, dtype=torch.long, device=META), use_cache=False)
        except _Reached:
            return found
    raise UnsupportedModel(
        f"{type(model).__name__} called {len(found)} of the {len(wanted)} blocks that are wanted."
    )


def _kind(
    block: nn.Module, hidden: Tensor, call: Call, indices: list[int], has_last: bool, tuning: bool
) -> Kind:
    """One block run: freely, with the inputs of its sites held, and with a graph for the backward
    pass.
    """
    with torch.no_grad(), without_numbers(block), Live() as holding:
        _, reads = _run(block, hidden, call, holding, hold=True)
    with (
        torch.no_grad(),
        without_numbers(block) as rules,
        FlopCounterMode(display=False) as counter,
        Live() as free,
    ):
        alive, _ = _run(block, hidden, call, free, hold=False)
    tuned = Live()
    if tuning:
        with torch.enable_grad(), without_numbers(block), tuned:
            run_block(block, hidden, call)
    reached = {name for read in reads for name in read.rows}
    covered, weights = coverage(block)
    return Kind(
        len(indices),
        indices[0],
        has_last,
        sum(p.numel() for p in block.parameters()),
        weights,
        covered,
        sum(b.nbytes for b in block.buffers()),
        tuple(replace(read, live_bytes=alive[read.group]) for read in reads),
        tuple(name for name in weight_matrices(block) if name not in reached),
        counter.get_total_flops() + rules.flops,
        rules.watching,
        free.peak,
        holding.peak,
        tuned.peak,
    )


def _run(
    block: nn.Module, hidden: Tensor, call: Call, live: Live, *, hold: bool
) -> tuple[dict[str, int], list[Read]]:
    """(what is alive when each group is reached, what the sites read).

    With `hold` the inputs that are read stay alive, as those do that a run looks at; an identity
    tells inputs apart only while they live, so without it none are told.
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
                _, read = seen.setdefault(
                    (id(x), x._version), (x, Read(x.shape[-1], {}, 1.0, name, 0))
                )
                read.rows[name] = rows

        return see

    def fused(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = ExpertLayer.of(module, [*args, *kwargs.values()])
            for part, matrix in enumerate(experts.matrices(module)):
                alive[f"{name}.{matrix}"] = live.now + part * layer.inner_bytes
                held.append(hidden.new_empty(layer.tokens, layer.columns[part]) if hold else hidden)
                of_experts.extend(
                    Read(
                        layer.columns[part],
                        {f"{name}.{expert}.{matrix}": layer.rows[part]},
                        layer.tokens / layer.all_tokens / layer.count,
                        f"{name}.{matrix}",
                        0,
                    )
                    for expert in range(layer.count)
                )

        return see

    known = weight_matrices(block)
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
