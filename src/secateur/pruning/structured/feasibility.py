"""Before any work: what of a model can go, how many of it, and the stock configuration that holds
what is left.

One block of each kind is traced. What comes out is tried on the block itself with stand-ins for the
units that will go: the block as the smaller configuration builds it must do what the dense block
does without them. So whatever cannot be held, or is wired in a way that no trace shows, is refused
here with the counts that would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from secateur.errors import BadPattern, SecateurError, UnsupportedModel
from secateur.methods.structures import Structure, Units, default_alignment, parts
from secateur.models.channels.groups import ChannelGroup, removable_groups
from secateur.models.channels.trace import trace
from secateur.models.context import vocabulary_size
from secateur.models.matrices import signature, weight_matrices
from secateur.models.replay import LanguageModel, Shell, close, own, run_block, working_copy
from secateur.pruning.structured import target_config as stock
from secateur.pruning.structured.slicing import (
    State,
    experts_of,
    module_of,
    without_experts,
    without_units,
)
from secateur.pruning.structured.target_config import Number, Stock, find_stock, tensor_shapes

NARROW = 0.1
"""A matrix with fewer inputs than this share of the widest is no feed-forward: a low-rank side
path, say.
"""


@dataclass(frozen=True)
class Consumer:
    """A site whose inputs go in units, and how many of these go."""

    units: list[ChannelGroup]
    gone: int
    of: str
    expert: bool = False

    @property
    def inputs(self) -> Tensor:
        """The inputs of every unit, int64 `[units, inputs of each]`."""
        return torch.tensor([unit.inputs for unit in self.units])


@dataclass(frozen=True)
class BlockCut:
    """What goes out of every block of one kind: units by their reader, heads first, and experts by
    their module.
    """

    consumers: dict[str, Consumer]
    experts: dict[str, tuple[int, int]]
    """(how many there are, how many go)"""


@dataclass(frozen=True)
class Feasibility:
    """`kinds` by signature of a block; `stock` is the smaller model, `kept` the blocks that
    stay.
    """

    kinds: Mapping[Any, BlockCut]
    kept: tuple[int, ...]
    stock: Stock

    def of(self, block: nn.Module) -> BlockCut:
        return self.kinds[signature(block)]


def survey(
    language_model: LanguageModel,
    structure: Structure,
    kept: Sequence[int],
    align: int | None,
    device: torch.device,
) -> Feasibility:
    """What goes out of the blocks that stay. Raises BadPattern or UnsupportedModel, with the counts
    that would do.
    """
    found = _traced(language_model, structure, device)
    for among in _alternatives(found):
        kinds = {
            kind: _counted(cut, structure, align, language_model) for kind, cut in among.items()
        }
        if fitting := _find(language_model, kinds, kept):
            result = Feasibility(kinds, tuple(kept), fitting)
            _try(language_model, result, device)
            return result
    raise UnsupportedModel(_no_stock(language_model, structure, found, kept))


def block_parameters(language_model: LanguageModel) -> int:
    """How many parameters the blocks of a model have."""
    return sum(
        parameter.numel() for block in language_model.blocks for parameter in block.parameters()
    )


def holds(language_model: LanguageModel) -> Callable[[Sequence[int]], bool]:
    """Whether a stock configuration holds the model without some of its blocks."""
    total = len(language_model.blocks)
    nothing = {signature(block): BlockCut({}, {}) for block in language_model.blocks}

    def asked(gone: Sequence[int]) -> bool:
        kept = [i for i in range(total) if i not in gone]
        return len(nothing) == 1 or _find(language_model, nothing, kept) is not None

    return asked


def _traced(
    language_model: LanguageModel, structure: Structure, device: torch.device
) -> dict[Any, BlockCut]:
    """All that could go out of each kind of block, of what the structure names. Raises
    UnsupportedModel for nothing.
    """
    wanted = {part.of for part in parts(structure) if isinstance(part, Units)}
    found: dict[Any, BlockCut] = {}
    for index, block in enumerate(language_model.blocks):
        if (kind := signature(block)) in found:
            continue
        units, known = dict[str, list[ChannelGroup]](), weight_matrices(block)
        if wanted & {"channels", "heads"}:
            units = _units(language_model, index, device)
        heads = {n: u for n, u in units.items() if len(u[0].inputs) > 1 and len(u) > 1}
        channels = {n: u for n, u in units.items() if len(u[0].inputs) == 1}
        widest = max((len(u) for u in channels.values()), default=0)
        channels = {n: u for n, u in channels.items() if len(u) >= NARROW * widest}
        consumers = {}
        for of, kinds in (("heads", heads), ("channels", channels)):
            if of in wanted:
                consumers |= {
                    name: Consumer(u, 0, of, known[name].expert) for name, u in kinds.items()
                }
        found[kind] = BlockCut(
            consumers,
            {n: (count, 0) for n, count in experts_of(block).items()}
            if "experts" in wanted
            else {},
        )
    seen = {consumer.of for cut in found.values() for consumer in cut.consumers.values()}
    seen |= {"experts" for cut in found.values() if cut.experts}
    for part in (
        part for part in parts(structure) if isinstance(part, Units) and part.of not in seen
    ):
        of = part.of
        name = type(language_model.model).__name__
        raise UnsupportedModel(
            {
                "experts": f"{name} has no experts that transformers keeps in one module; {part} cannot go.",
                "heads": f"{name} has no heads that can go: all heads of a block are bound together (one key-value "
                "head, or a norm over all of them).",
                "channels": f"{name} has no feed-forward channels that can go: something binds them together, such "
                "as a norm over all of them.",
            }[of]
        )
    return found


_UNITS: WeakKeyDictionary[nn.Module, dict[Any, dict[str, list[ChannelGroup]]]] = WeakKeyDictionary()


def _units(
    language_model: LanguageModel, index: int, device: torch.device
) -> dict[str, list[ChannelGroup]]:
    """The units of a block that can go: traced once for every kind of block of a model, however
    often it is asked.

    A trace of a wide block takes minutes on a processor, and a size or a number of blocks asks
    several times.
    """
    known = _UNITS.setdefault(language_model.model, {})
    kind = signature(language_model.blocks[index])
    if kind not in known:
        known[kind] = removable_groups(
            trace(language_model, index, device=device, dtype=torch.float32)
        )
    return known[kind]


def _alternatives(found: Mapping[Any, BlockCut]) -> Iterator[Mapping[Any, BlockCut]]:
    """All that could go; else the widest channels alone, since a side path may have no field of its
    own; else one kind of head alone, since linear attention beside softmax attention seldom has
    one.
    """
    yield found

    def only(wanted: Callable[[str, Consumer, BlockCut], bool]) -> Mapping[Any, BlockCut]:
        return {
            kind: BlockCut(
                {n: c for n, c in cut.consumers.items() if wanted(n, c, cut)}, cut.experts
            )
            for kind, cut in found.items()
        }

    def widest(name: str, consumer: Consumer, cut: BlockCut) -> bool:
        most = max(len(c.units) for c in cut.consumers.values() if c.of == consumer.of)
        return consumer.of == "heads" or len(consumer.units) == most

    yield only(widest)
    names = {n: None for cut in found.values() for n, c in cut.consumers.items() if c.of == "heads"}
    for kept in names if len(names) > 1 else ():
        yield only(
            lambda name, consumer, cut, kept=kept: (
                name == kept or (consumer.of != "heads" and widest(name, consumer, cut))
            )
        )


def _counted(
    cut: BlockCut, structure: Structure, align: int | None, language_model: LanguageModel
) -> BlockCut:
    """The same with the numbers that go. Raises BadPattern."""
    asked = {part.of: part for part in parts(structure) if isinstance(part, Units)}
    config = language_model.model.config
    # Kernels that multiply by all experts at once take rows of whole 16 bytes only.
    least = 16 // (getattr(config, "dtype", None) or torch.float32).itemsize
    consumers = {}
    for name, consumer in cut.consumers.items():
        total = len(consumer.units)
        steps = align
        if consumer.expert:
            steps = lcm(align or default_alignment(total), least)
        kept = asked[consumer.of].kept(
            total, steps, f"{name} of {type(language_model.model).__name__}"
        )  # type: ignore[index]
        consumers[name] = replace(consumer, gone=total - kept)
    experts = {}
    for name, (total, _) in cut.experts.items():
        kept = asked["experts"].kept(
            total, align, f"{name} of {type(language_model.model).__name__}"
        )
        active = getattr(config, "num_experts_per_tok", None) or 1
        if kept < active:
            raise BadPattern(
                f"{name} sends every token to {active} of its {total} experts; {asked['experts']} would leave {kept}. "
                f"At most {100 * (total - active) / total:.3g}% can go."
            )
        _check_groups(config, name, kept)
        experts[name] = total, total - kept
    return BlockCut(consumers, experts)


def _check_groups(config: Any, name: str, kept: int) -> None:
    """Raise BadPattern where a router that looks for experts in groups could not do so among those
    that stay.
    """
    groups = getattr(config, "n_group", None) or 1
    chosen, active = (
        getattr(config, "topk_group", None) or 1,
        getattr(config, "num_experts_per_tok", None) or 1,
    )
    if groups > 1 and (kept % groups or kept // groups < 2 or chosen * (kept // groups) < active):
        raise BadPattern(
            f"{name} chooses {active} experts from {chosen} of {groups} groups; {kept} experts cannot be grouped so. "
            f"Let a multiple of {groups} stay, at least {max(2 * groups, -(-active // chosen) * groups)}."
        )


def _find(
    language_model: LanguageModel, kinds: Mapping[Any, BlockCut], kept: Sequence[int]
) -> Stock | None:
    """The stock model of a cut, by its shapes."""
    empty = stock.empty(language_model)
    shapes = dict(tensor_shapes(language_model))
    dense: dict[Any, dict[str, tuple[int, ...]]] = {}
    for index in range(len(language_model.blocks)):
        start = f"{language_model.block_name(index)}."
        for name in [name for name in shapes if name.startswith(start)]:
            del shapes[name]
    for position, index in enumerate(kept):
        block = language_model.blocks[index]
        kind = signature(block)
        if kind not in dense:
            state = _stand_in(empty.blocks[index], kinds[kind])
            dense[kind] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        shapes |= {
            f"{language_model.block_name(position)}.{name}": shape
            for name, shape in dense[kind].items()
        }
    return find_stock(language_model, shapes, _numbers(language_model, kinds), kept)


def _stand_in(block: nn.Module, cut: BlockCut) -> State:
    """The tensors of a block without the last units of each consumer, and the last experts."""
    state = without_units(block, _last_units(cut))
    return without_experts(
        block, state, {n: torch.arange(total - gone) for n, (total, gone) in cut.experts.items()}
    )


def _last_units(cut: BlockCut) -> dict[str, list[ChannelGroup]]:
    return {
        name: consumer.units[len(consumer.units) - consumer.gone :]
        for name, consumer in cut.consumers.items()
    }


def _numbers(language_model: LanguageModel, kinds: Mapping[Any, BlockCut]) -> list[Number]:
    """The numbers of a configuration that change."""
    found: dict[Number, None] = {}
    heads = getattr(language_model.model.config, "num_attention_heads", None)
    for cut in kinds.values():
        for consumer in cut.consumers.values():
            total = len(consumer.units)
            left = total - consumer.gone
            if consumer.of == "heads":
                found[Number(total, left, stock.HEADS)] = None
                if heads and heads != total:
                    found[Number(heads, heads * left // total, stock.HEADS)] = None
            else:
                found[Number(total, left, stock.CHANNELS)] = None
        for total, gone in cut.experts.values():
            found[Number(total, total - gone, stock.EXPERTS)] = None
    return [number for number in found if number.old != number.new]


def _no_stock(
    language_model: LanguageModel,
    structure: Structure,
    found: Mapping[Any, BlockCut],
    kept: Sequence[int],
) -> str:
    """Why nothing holds the result, and what would be held."""
    name, said = type(language_model.model).__name__, list[str]()
    for of in ("heads", "channels"):
        totals = {
            len(c.units) for cut in found.values() for c in cut.consumers.values() if c.of == of
        }
        if not totals:
            continue
        counts = range(1, max(totals)) if of == "heads" else [max(totals) // 2]
        fitting = [
            f"{left} of {max(totals)}"
            for left in counts
            if _find(
                language_model,
                {kind: _counted_to(cut, of, left) for kind, cut in found.items()},
                kept,
            )
        ]
        if fitting and of == "heads":
            said.append(f"of the heads it would hold {', '.join(fitting)}")
        elif not fitting:
            said.append(f"it has no field for the number of {of} alone")
    why = f" ({'; '.join(said)})" if said else ""
    return f"No configuration of transformers holds {name} without {structure}{why}. Nothing was written."


def _counted_to(cut: BlockCut, of: str, left: int) -> BlockCut:
    mine = {n: c for n, c in cut.consumers.items() if c.of == of}
    consumers = {n: replace(c, gone=max(len(c.units) - left, 0)) for n, c in mine.items()}
    return BlockCut(consumers, {})


@torch.no_grad()
def _try(language_model: LanguageModel, found: Feasibility, device: torch.device) -> None:
    """Compare blocks of the smaller model with the dense ones whose units that go read as zero, in
    one pass.

    One block of every kind, or every one that stays where blocks go: some count them, or know their
    own number. Blocks that lose experts route otherwise than before and are left out; the reloaded
    model is compared at the end.
    """
    vocabulary = vocabulary_size(language_model.model)
    tokens = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    hidden, calls = Shell(language_model, device, torch.float32, head=False).enter(tokens)
    seen, fewer = set(), len(found.kept) < len(language_model.blocks)
    wanted = [i for i in found.kept if fewer or found.of(language_model.blocks[i]).consumers]
    for index, original in enumerate(language_model.blocks[: max(wanted, default=-1) + 1]):
        block, call = working_copy(original, device, torch.float32), calls[index]
        cut = found.of(original)
        before = own(call, {})
        dense = run_block(block, hidden, call)
        if index in wanted and not cut.experts and (fewer or signature(original) not in seen):
            seen.add(signature(original))
            gone = _last_units(cut)
            state = without_units(block, gone)
            for name, units in gone.items():
                weight_matrices(block)[name].weight[
                    :, [i for unit in units for i in unit.inputs]
                ] = 0
            expected = run_block(block, hidden, before) if gone else dense
            empty = found.stock.language_model.blocks[found.kept.index(index)]
            _compare(
                language_model,
                index,
                expected,
                lambda e=empty, s=state, b=block, h=hidden, c=call: run_block(
                    module_of(e, s, b).to(device), h, own(c, {})
                ),
            )
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
        f"{language_model.block_name(index)} of {type(language_model.model).__name__} does not compute the same with "
        f"fewer channels, heads or blocks as with zeros in their place ({what}): it depends on their number or order."
    )
