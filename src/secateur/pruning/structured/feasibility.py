"""Before any work: what of a model can go, how many of it, and the stock configuration that holds
what is left.

One block of each kind is traced. What comes out is tried on the block itself with stand-ins for the
groups that will go: the block as the smaller configuration builds it must do what the dense block
does without them. So whatever cannot be held, or is wired in a way that no trace shows, is refused
here with the counts that would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadPattern, SecateurError, UnsupportedModel
from secateur.methods.structures import Structure, Units, default_alignment, parts
from secateur.models.channels.groups import ChannelGroup, removable_groups
from secateur.models.channels.trace import trace
from secateur.models.matrices import signature, weight_matrices
from secateur.models.replay import LanguageModel, Shell, close, own, run_block, working_copy
from secateur.pruning.structured.slicing import (
    experts_of,
    module_of,
    without_experts,
    without_groups,
)
from secateur.pruning.structured.target_config import (
    CHANNELS,
    EXPERTS,
    HEADS,
    Number,
    Target,
    empty,
    find_target,
    tensor_shapes,
)

NARROW = 0.1
"""A matrix with fewer inputs than this share of the widest is no feed-forward: a low-rank side
path, say.
"""


@dataclass(frozen=True)
class Consumer:
    """A weight matrix whose inputs go in groups, all of `of` (channels, heads), and how many of
    these groups are removed.
    """

    groups: list[ChannelGroup]
    of: str
    removed: int = 0
    expert: bool = False

    @property
    def inputs(self) -> Tensor:
        """The inputs of every group, int64 `[groups, inputs of each]`."""
        return torch.tensor([group.inputs for group in self.groups])


@dataclass(frozen=True)
class BlockRemoval:
    """What goes out of every block of one kind: groups of channels by the name of the matrix that
    reads them, heads first, and experts by the name of their module.
    """

    consumers: dict[str, Consumer]
    experts: dict[str, tuple[int, int]]
    """(how many there are, how many go)"""

    @property
    def last_groups(self) -> dict[str, list[ChannelGroup]]:
        """The last groups of every consumer, as many as go: they stand in for those that will be
        chosen.
        """
        return {
            name: consumer.groups[len(consumer.groups) - consumer.removed :]
            for name, consumer in self.consumers.items()
        }


@dataclass(frozen=True)
class Removal:
    """What goes out of a model: `kinds` by the signature of a block, `kept` the blocks that stay,
    `target` the smaller model.
    """

    kinds: Mapping[Any, BlockRemoval]
    kept: tuple[int, ...]
    target: Target

    def of(self, block: nn.Module) -> BlockRemoval:
        return self.kinds[signature(block)]


class Feasibility:
    """What a model can lose so that a stock configuration of transformers holds the rest.

    Make it once and ask it as often as needed: every kind of block is traced once, on `device`,
    which takes minutes for wide blocks on a processor.
    """

    def __init__(self, language_model: LanguageModel, device: torch.device) -> None:
        self.language_model, self.device = language_model, device
        self._groups: dict[Any, dict[str, list[ChannelGroup]]] = {}

    @cached_property
    def _empty(self) -> LanguageModel:
        return empty(self.language_model)

    def removal(
        self, structure: Structure, align: int | None, kept: Sequence[int] | None = None
    ) -> Removal:
        """What of the blocks in `kept`, or of all, a structure takes out. Raises BadPattern or
        UnsupportedModel, with the counts that would do.
        """
        kept = range(len(self.language_model.blocks)) if kept is None else kept
        available = self._available(structure)
        for alternative in _alternatives(available):
            kinds = {
                kind: _counted(block, structure, align, self.language_model)
                for kind, block in alternative.items()
            }
            if target := self._target(kinds, kept):
                removal = Removal(kinds, tuple(kept), target)
                _try(self.language_model, removal, self.device)
                return removal
        raise UnsupportedModel(self._no_target(structure, available, kept))

    def holds(self, removed: Sequence[int]) -> bool:
        """Whether a stock configuration holds the model without these blocks."""
        blocks = self.language_model.blocks
        nothing = {signature(block): BlockRemoval({}, {}) for block in blocks}
        kept = [index for index in range(len(blocks)) if index not in removed]
        return len(nothing) == 1 or self._target(nothing, kept) is not None

    def _available(self, structure: Structure) -> dict[Any, BlockRemoval]:
        """All that could go out of each kind of block, of what the structure names. Raises
        UnsupportedModel for nothing.
        """
        units = [part for part in parts(structure) if isinstance(part, Units)]
        wanted = {part.of for part in units}
        available: dict[Any, BlockRemoval] = {}
        for index, block in enumerate(self.language_model.blocks):
            if (kind := signature(block)) not in available:
                consumers = self._consumers(index) if wanted & {"channels", "heads"} else {}
                experts = experts_of(block) if "experts" in wanted else {}
                available[kind] = BlockRemoval(
                    {name: c for name, c in consumers.items() if c.of in wanted},
                    {name: (count, 0) for name, count in experts.items()},
                )
        there = {c.of for removal in available.values() for c in removal.consumers.values()}
        there |= {"experts" for removal in available.values() if removal.experts}
        for part in units:
            if part.of not in there:
                raise UnsupportedModel(_cannot_go(self.language_model, part))
        return available

    def _consumers(self, index: int) -> dict[str, Consumer]:
        """The matrices of a block whose inputs go in groups, heads first."""
        block = self.language_model.blocks[index]
        kind, matrices = signature(block), weight_matrices(block)
        if kind not in self._groups:
            self._groups[kind] = removable_groups(
                trace(self.language_model, index, device=self.device, dtype=torch.float32)
            )
        groups = self._groups[kind]
        heads = {n: g for n, g in groups.items() if len(g[0].inputs) > 1 and len(g) > 1}
        channels = {n: g for n, g in groups.items() if len(g[0].inputs) == 1}
        widest = max(map(len, channels.values()), default=0)
        channels = {n: g for n, g in channels.items() if len(g) >= NARROW * widest}
        return {
            name: Consumer(found, of, expert=matrices[name].expert)
            for of, some in (("heads", heads), ("channels", channels))
            for name, found in some.items()
        }

    def _target(self, kinds: Mapping[Any, BlockRemoval], kept: Sequence[int]) -> Target | None:
        """The stock model without what goes, by its shapes."""
        language_model = self.language_model
        starts = tuple(f"{language_model.block_name(i)}." for i in range(len(self._empty.blocks)))
        shapes = {
            name: shape
            for name, shape in tensor_shapes(language_model.model).items()
            if not name.startswith(starts)
        }
        of_kind: dict[Any, dict[str, tuple[int, ...]]] = {}
        for position, index in enumerate(kept):
            kind = signature(language_model.blocks[index])
            if kind not in of_kind:
                block, removal = self._empty.blocks[index], kinds[kind]
                state = without_groups(block, removal.last_groups)
                left = {
                    n: torch.arange(total - gone) for n, (total, gone) in removal.experts.items()
                }
                state = without_experts(block, state, left)
                of_kind[kind] = {name: tuple(tensor.shape) for name, tensor in state.items()}
            for name, shape in of_kind[kind].items():
                shapes[f"{language_model.block_name(position)}.{name}"] = shape
        return find_target(language_model, shapes, _numbers(language_model, kinds), kept)

    def _no_target(
        self, structure: Structure, available: Mapping[Any, BlockRemoval], kept: Sequence[int]
    ) -> str:
        """Why nothing holds the result, and what would be held."""
        reasons = []
        for of in ("heads", "channels"):
            most = max(
                (
                    len(consumer.groups)
                    for removal in available.values()
                    for consumer in removal.consumers.values()
                    if consumer.of == of
                ),
                default=0,
            )
            if not most:
                continue
            fitting = [
                f"{left} of {most}"
                for left in (range(1, most) if of == "heads" else [most // 2])
                if self._target({k: _left(r, of, left) for k, r in available.items()}, kept)
            ]
            if fitting and of == "heads":
                reasons.append(f"of the heads it would hold {', '.join(fitting)}")
            elif not fitting:
                reasons.append(f"it has no field for the number of {of} alone")
        why = f" ({'; '.join(reasons)})" if reasons else ""
        name = type(self.language_model.model).__name__
        return (
            f"No configuration of transformers holds {name} without {structure}{why}. Nothing was "
            "written."
        )


def block_parameters(language_model: LanguageModel) -> int:
    """How many parameters the blocks of a model have."""
    return sum(
        parameter.numel() for block in language_model.blocks for parameter in block.parameters()
    )


def _cannot_go(language_model: LanguageModel, part: Units) -> str:
    name = type(language_model.model).__name__
    return {
        "experts": f"{name} has no experts that transformers keeps in one module; {part} cannot "
        "go.",
        "heads": f"{name} has no heads that can go: all heads of a block are bound together (one "
        "key-value head, or a norm over all of them).",
        "channels": f"{name} has no feed-forward channels that can go: something binds them "
        "together, such as a norm over all of them.",
    }[part.of]


def _alternatives(available: Mapping[Any, BlockRemoval]) -> Iterator[Mapping[Any, BlockRemoval]]:
    """All that could go; else the widest channels alone, since a side path may have no field of its
    own; else one kind of head alone, since linear attention beside softmax attention seldom has
    one.
    """
    yield available

    def only(head: str | None) -> Mapping[Any, BlockRemoval]:
        chosen = {}
        for kind, removal in available.items():
            widths = [len(c.groups) for c in removal.consumers.values() if c.of == "channels"]
            consumers = {
                name: consumer
                for name, consumer in removal.consumers.items()
                if (
                    head in (None, name)
                    if consumer.of == "heads"
                    else len(consumer.groups) == max(widths)
                )
            }
            chosen[kind] = BlockRemoval(consumers, removal.experts)
        return chosen

    yield only(None)
    heads = dict.fromkeys(
        name
        for removal in available.values()
        for name, consumer in removal.consumers.items()
        if consumer.of == "heads"
    )
    if len(heads) > 1:
        yield from map(only, heads)


def _counted(
    removal: BlockRemoval, structure: Structure, align: int | None, language_model: LanguageModel
) -> BlockRemoval:
    """The same with the numbers that go. Raises BadPattern."""
    asked = {part.of: part for part in parts(structure) if isinstance(part, Units)}
    config, family = language_model.model.config, type(language_model.model).__name__
    # Kernels that multiply by all experts at once take rows of whole 16 bytes only.
    least = 16 // (getattr(config, "dtype", None) or torch.float32).itemsize
    consumers = {}
    for name, consumer in removal.consumers.items():
        total, steps = len(consumer.groups), align
        if consumer.expert:
            steps = lcm(align or default_alignment(total), least)
        kept = asked[consumer.of].kept(total, steps, f"{name} of {family}")  # type: ignore[index]
        consumers[name] = replace(consumer, removed=total - kept)
    experts = {}
    for name, (total, _) in removal.experts.items():
        kept = asked["experts"].kept(total, align, f"{name} of {family}")
        active = getattr(config, "num_experts_per_tok", None) or 1
        if kept < active:
            raise BadPattern(
                f"{name} sends every token to {active} of its {total} experts; {asked['experts']} "
                f"would leave {kept}. At most {100 * (total - active) / total:.3g}% can go."
            )
        _check_routing(config, name, kept)
        experts[name] = total, total - kept
    return BlockRemoval(consumers, experts)


def _left(removal: BlockRemoval, of: str, left: int) -> BlockRemoval:
    """The same where `left` groups of one kind stay, and nothing else goes."""
    return BlockRemoval(
        {
            name: replace(consumer, removed=max(len(consumer.groups) - left, 0))
            for name, consumer in removal.consumers.items()
            if consumer.of == of
        },
        {},
    )


def _check_routing(config: Any, name: str, kept: int) -> None:
    """Raise BadPattern where a router that looks for experts in groups could not do so among those
    that stay.
    """
    groups, chosen, active = (
        getattr(config, field, None) or 1
        for field in ("n_group", "topk_group", "num_experts_per_tok")
    )
    if groups > 1 and (kept % groups or kept // groups < 2 or chosen * (kept // groups) < active):
        raise BadPattern(
            f"{name} chooses {active} experts from {chosen} of {groups} groups; {kept} experts "
            f"cannot be grouped so. Let a multiple of {groups} stay, at least "
            f"{max(2 * groups, -(-active // chosen) * groups)}."
        )


def _numbers(language_model: LanguageModel, kinds: Mapping[Any, BlockRemoval]) -> list[Number]:
    """The numbers of a configuration that change."""
    numbers: list[Number] = []
    query_heads = getattr(language_model.model.config, "num_attention_heads", None)
    for removal in kinds.values():
        for consumer in removal.consumers.values():
            total = len(consumer.groups)
            left = total - consumer.removed
            if consumer.of == "heads":
                numbers += [
                    Number(old, old * left // total, HEADS) for old in (total, query_heads or total)
                ]
            else:
                numbers.append(Number(total, left, CHANNELS))
        numbers += [
            Number(total, total - gone, EXPERTS) for total, gone in removal.experts.values()
        ]
    return [number for number in dict.fromkeys(numbers) if number.old != number.new]


@torch.no_grad()
def _try(language_model: LanguageModel, removal: Removal, device: torch.device) -> None:
    """Compare blocks of the smaller model with the dense ones whose groups that go read as zero, in
    one pass.

    One block of every kind, or every one that stays where blocks go: some count them, or know their
    own number. Blocks that lose experts route otherwise than before and are left out; the reloaded
    model is compared at the end.
    """
    embeddings: Any = language_model.model.get_input_embeddings()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(embeddings.weight.shape[0], (2, 16), generator=draw)
    hidden, calls = Shell(language_model, device, torch.float32, head=False).enter(tokens)
    blocks = language_model.blocks
    tried, fewer = set(), len(removal.kept) < len(blocks)
    wanted = [i for i in removal.kept if fewer or removal.of(blocks[i]).consumers]
    for index, original in enumerate(blocks[: max(wanted, default=-1) + 1]):
        block, call = working_copy(original, device, torch.float32), calls[index]
        of_block, kind = removal.of(original), signature(original)
        before = own(call, {})
        dense = run_block(block, hidden, call)
        if index in wanted and not of_block.experts and (fewer or kind not in tried):
            tried.add(kind)
            gone = of_block.last_groups
            state = without_groups(block, gone)
            for name, groups in gone.items():
                inputs = [i for group in groups for i in group.inputs]
                weight_matrices(block)[name].weight[:, inputs] = 0
            expected = run_block(block, hidden, before) if gone else dense
            meta = removal.target.language_model.blocks[removal.kept.index(index)]

            def smaller(meta=meta, state=state, block=block, hidden=hidden, call=call) -> Tensor:
                return run_block(module_of(meta, state, block).to(device), hidden, own(call, {}))

            _compare(language_model, index, expected, smaller)
        hidden = dense


def _compare(
    language_model: LanguageModel, index: int, wanted: Tensor, smaller: Callable[[], Tensor]
) -> None:
    """Raise UnsupportedModel unless the smaller block runs and gives what is wanted."""
    what = "its output differs"
    if not wanted.isfinite().all():
        return  # named when its weights are read
    try:
        got = smaller()
        if got.shape == wanted.shape and close(wanted, got):
            return
    except SecateurError:
        raise
    except Exception as error:  # whatever a family's forward raises when its sizes do not fit
        what = type(error).__name__
    raise UnsupportedModel(
        f"{language_model.block_name(index)} of {type(language_model.model).__name__} does not "
        "compute the same with fewer channels, heads or blocks as with zeros in their place "
        f"({what}): it depends on their number or order."
    )
