"""Before any work: what of a model can go, how many of it, and the stock configuration that holds
what is left.

One block of each kind is traced. What comes out is tried on the block itself with stand-ins for the
groups that will go: the block as the smaller configuration builds it must do what the dense block
does without them. So whatever cannot be held, or is wired in a way that no trace shows, is refused
here with the counts that would do.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import BadPattern, SecateurError, UnsupportedModel
from secateur.methods.structures import Kind, Structure, Units, default_alignment, parts
from secateur.models.channels.groups import ChannelGroup, removable_groups
from secateur.models.channels.trace import trace
from secateur.models.experts import count, fused_experts
from secateur.models.matrices import signature, weight_matrices
from secateur.models.replay import Call, LanguageModel, Shell, close, own, run_block, working_copy
from secateur.pruning.structured.slicing import State, module_of, without_experts, without_groups
from secateur.pruning.structured.target_config import Number, empty, find_target, tensor_shapes

NARROW = 0.1
"""With fewer inputs than this share of the widest, a matrix is a side path, no feed-forward."""


@dataclass(frozen=True)
class Choice:
    """How many of the `total` channels, heads or experts of one module are removed; which, is open.

    Channels and heads go by the name of the weight matrix that reads them, in `groups` of inputs;
    `expert`: whether that belongs to one expert. Experts go by the name of their module.
    """

    of: Kind | Literal["blocks"]
    total: int
    groups: Sequence[ChannelGroup] = ()
    expert: bool = False
    removed: int = 0

    @property
    def left(self) -> int:
        return self.total - self.removed

    @property
    def inputs(self) -> Tensor:
        """The inputs of every group, int64 `[groups, inputs of each]`."""
        return torch.tensor([group.inputs for group in self.groups])


BlockRemoval = Mapping[str, Choice]
"""What goes out of every block of one kind, by name: heads first, then channels, then experts."""


def last_groups(removal: BlockRemoval) -> dict[str, Sequence[ChannelGroup]]:
    """The last groups of every matrix, as many as go, in place of those that will be chosen."""
    return {name: part.groups[part.left :] for name, part in removal.items() if part.groups}


@dataclass(frozen=True)
class Removal:
    """What goes out of a model, by the signature of a block; `kept` names the blocks that stay.

    `smaller` is what is left, on the meta device, and `changes` what it has in its `config.json`.
    """

    kinds: Mapping[Any, BlockRemoval]
    kept: tuple[int, ...]
    smaller: LanguageModel
    changes: Mapping[str, Any]

    def of(self, block: nn.Module) -> BlockRemoval:
        return self.kinds[signature(block)]


def blocks_for_pictures(language_model: LanguageModel) -> int:
    """Behind how many of the first blocks something of a picture is added, by their number
    (DeepStack, Qwen3-VL): none of them can go.
    """
    whole = language_model.model.config
    if getattr(whole, "deepstack_layer_map", None):
        return len(language_model.blocks)
    vision = getattr(whole, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


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
                removal = Removal(kinds, tuple(kept), *target)
                _try(self.language_model, removal, self.device)
                return removal
        raise UnsupportedModel(self._no_target(structure, available, kept))

    def holds(self, removed: Sequence[int]) -> bool:
        """Whether a stock configuration holds the model without these blocks, and pictures enter
        where they did.
        """
        blocks = self.language_model.blocks
        if removed and min(removed) < blocks_for_pictures(self.language_model):
            return False
        nothing: dict[Any, BlockRemoval] = {signature(block): {} for block in blocks}
        kept = [index for index in range(len(blocks)) if index not in removed]
        return len(nothing) == 1 or self._target(nothing, kept) is not None

    def _available(self, structure: Structure) -> dict[Any, BlockRemoval]:
        """All that could go of what a structure names, by kind of block; else UnsupportedModel."""
        units = [part for part in parts(structure) if isinstance(part, Units)]
        wanted = {part.of for part in units}
        available: dict[Any, BlockRemoval] = {}
        for index, block in enumerate(self.language_model.blocks):
            if (kind := signature(block)) not in available:
                available[kind] = self._choices(index, wanted)
        there = {choice.of for removal in available.values() for choice in removal.values()}
        for part in units:
            if part.of not in there:
                raise UnsupportedModel(_cannot_go(self.language_model, part))
        return available

    def _choices(self, index: int, wanted: Set[str]) -> BlockRemoval:
        """What could go out of a block, of the kinds that are wanted."""
        block = self.language_model.blocks[index]
        kind, matrices = signature(block), weight_matrices(block)
        if wanted & {"channels", "heads"} and kind not in self._groups:
            self._groups[kind] = removable_groups(
                trace(self.language_model, index, device=self.device, dtype=torch.float32)
            )
        groups = self._groups.get(kind, {})
        heads = {n: g for n, g in groups.items() if len(g[0].inputs) > 1 and len(g) > 1}
        channels = {n: g for n, g in groups.items() if len(g[0].inputs) == 1}
        widest = max(map(len, channels.values()), default=0)
        channels = {n: g for n, g in channels.items() if len(g) >= NARROW * widest}
        choices = {n: Choice("heads", len(g), g, matrices[n].expert) for n, g in heads.items()}
        for name, some in channels.items():
            choices[name] = Choice("channels", len(some), some, matrices[name].expert)
        for name, module in fused_experts(block).items():
            choices[name] = Choice("experts", count(module))
        return {name: choice for name, choice in choices.items() if choice.of in wanted}

    def _target(
        self, kinds: Mapping[Any, BlockRemoval], kept: Sequence[int]
    ) -> tuple[LanguageModel, Mapping[str, Any]] | None:
        """The stock model without what goes, by its shapes, and what changes in its config."""
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
                state = without_groups(block, last_groups(removal))
                experts = {n: torch.arange(p.left) for n, p in removal.items() if not p.groups}
                state = without_experts(block, state, experts)
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
            choices = (choice for removal in available.values() for choice in removal.values())
            totals = [choice.total for choice in choices if choice.of == of]
            if not (most := max(totals, default=0)):
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
            widest = max((p.total for p in removal.values() if p.of == "channels"), default=0)
            chosen[kind] = {
                name: choice
                for name, choice in removal.items()
                if (choice.of != "heads" or head in (None, name))
                and (choice.of != "channels" or choice.total == widest)
            }
        return chosen

    yield only(None)
    choices = [choice for removal in available.values() for choice in removal.items()]
    heads = dict.fromkeys(name for name, choice in choices if choice.of == "heads")
    if len(heads) > 1:
        yield from map(only, heads)


def _counted(
    removal: BlockRemoval, structure: Structure, align: int | None, language_model: LanguageModel
) -> BlockRemoval:
    """The same with the numbers that go. Raises BadPattern."""
    asked: dict[str, Units] = {p.of: p for p in parts(structure) if isinstance(p, Units)}
    config, family = language_model.text_config, type(language_model.model).__name__
    # Kernels that multiply by all experts at once take rows of whole 16 bytes only.
    least = 16 // (getattr(config, "dtype", None) or torch.float32).itemsize
    counted = {}
    for name, choice in removal.items():
        total, units, steps = choice.total, asked[choice.of], align
        if choice.expert:
            steps = lcm(align or default_alignment(total), least)
        kept = units.kept(total, steps, f"{name} of {family}")
        if choice.of == "experts":
            _check_routing(config, name, total, kept, units)
        counted[name] = replace(choice, removed=total - kept)
    return counted


def _left(removal: BlockRemoval, of: str, left: int) -> BlockRemoval:
    """The same where `left` units of one kind stay, and nothing else goes."""
    choices = {name: choice for name, choice in removal.items() if choice.of == of}
    return {n: replace(p, removed=max(p.total - left, 0)) for n, p in choices.items()}


def _check_routing(config: Any, name: str, total: int, kept: int, asked: Units) -> None:
    """Raise BadPattern where a router cannot do what it does among the `kept` experts."""
    groups, chosen, active = (
        getattr(config, field, None) or 1
        for field in ("n_group", "topk_group", "num_experts_per_tok")
    )
    if kept < active:
        raise BadPattern(
            f"{name} sends every token to {active} of its {total} experts; {asked} "
            f"would leave {kept}. At most {100 * (total - active) / total:.3g}% can go."
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
    query_heads = getattr(language_model.text_config, "num_attention_heads", None)
    for choice in (choice for removal in kinds.values() for choice in removal.values()):
        olds = [choice.total]
        if choice.of == "heads" and query_heads:
            olds.append(query_heads)
        numbers += [Number(old, old * choice.left // choice.total, choice.of) for old in olds]
    return [number for number in dict.fromkeys(numbers) if number.old != number.new]


@torch.no_grad()
def _try(language_model: LanguageModel, removal: Removal, device: torch.device) -> None:
    """Compare blocks of the smaller model with dense ones whose groups that go read as zero.

    One block of every kind, or every one that stays where blocks go: some count them, or know their
    own number. Blocks that lose experts route otherwise and are left out; the reloaded model is
    compared at the end.
    """
    embeddings: Any = language_model.model.get_input_embeddings()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(embeddings.weight.shape[0], (2, 16), generator=draw)
    hidden, calls = Shell(language_model, device, torch.float32, head=False).enter(tokens)
    blocks = language_model.blocks
    tried, fewer = set(), len(removal.kept) < len(blocks)
    wanted = [i for i in removal.kept if fewer or last_groups(removal.of(blocks[i]))]
    for index, original in enumerate(blocks[: max(wanted, default=-1) + 1]):
        block, call = working_copy(original, device, torch.float32), calls[index]
        kind, choices = signature(original), removal.of(original)
        routed = any(choice.of == "experts" for choice in choices.values())
        before = own(call, {})
        dense = run_block(block, hidden, call)
        if index in wanted and not routed and (fewer or kind not in tried):
            tried.add(kind)
            empty = removal.smaller.blocks[removal.kept.index(index)]
            state = without_groups(block, last_groups(choices))
            for name, groups in last_groups(choices).items():
                inputs = [i for group in groups for i in group.inputs]
                weight_matrices(block)[name].weight[:, inputs] = 0
            expected = run_block(block, hidden, before) if choices else dense
            if difference := _difference(empty, state, block, hidden, call, expected):
                raise UnsupportedModel(
                    f"{language_model.block_name(index)} of {type(language_model.model).__name__} "
                    "does not compute the same with fewer channels, heads or blocks as with zeros "
                    f"in their place ({difference}): it depends on their number or order."
                )
        hidden = dense


def _difference(
    empty: nn.Module, state: State, block: nn.Module, hidden: Tensor, call: Call, wanted: Tensor
) -> str:
    """How the smaller block differs from what is wanted, in words; "" where it does not."""
    if not wanted.isfinite().all():
        return ""  # named when its weights are read
    try:
        smaller = module_of(empty, state, block).to(hidden.device)
        got = run_block(smaller, hidden, own(call, {}))
    except SecateurError:
        raise
    except Exception as error:  # whatever a family's forward raises when its sizes do not fit
        return type(error).__name__
    return "" if got.shape == wanted.shape and close(wanted, got) else "its output differs"
