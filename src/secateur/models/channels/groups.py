"""Which channels of a block belong together, and which of those may change places.

What feeds the same inputs of a weight matrix and nothing else is a group: a feed-forward channel is
one row of the gate, one row of the up matrix and one column of the down matrix. Groups that nothing
else tells apart may be permuted for free (`permute`); a group may also be taken out as a whole. All
of it follows from where channels arrive (`trace`), so it is true as far as that goes: compare
numbers afterwards.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.models.channels.trace import Trace
from secateur.models.channels.trace import trace as trace_block
from secateur.models.replay import LanguageModel

Channel = tuple[str, int]
"""An output channel: the name of its weight matrix, and its number."""


@dataclass(frozen=True)
class ChannelGroup:
    """Inputs of a consumer, and the output channels that feed some of these inputs and no other.

    Of groups in one class (`interchangeable`), i-th inputs and i-th outputs correspond.
    """

    inputs: tuple[int, ...]
    outputs: tuple[Channel, ...]


def interchangeable_groups(
    language_model: LanguageModel, index: int, device: torch.device
) -> dict[str, list[list[ChannelGroup]]]:
    """By weight matrix, the groups of its inputs that may change places; traced in float32."""
    trace = trace_block(language_model, index, device=device, dtype=torch.float32)
    readers = {consumer for _, consumer in trace.reach}
    return {name: classes for name in sorted(readers) if (classes := interchangeable(trace, name))}


def removable_groups(trace: Trace) -> dict[str, list[ChannelGroup]]:
    """The groups that can be taken out whole, alike in size, by the weight matrix reading them.

    Channels and inputs that meet belong together, and so does whatever meets one of them: a
    feed-forward channel, or a key-value head with the query heads that read it. What also arrives
    elsewhere, or is reached from the block's own input, stays. So do the groups of a matrix that
    are not all alike, and what one matrix feeds to several.
    """
    sizes = _sizes(trace)  # every channel and every input is a node of a graph
    ends = np.cumsum(list(sizes.values()), dtype=int).tolist()
    nodes = {
        key: slice(end - size, end) for (key, size), end in zip(sizes.items(), ends, strict=True)
    }
    staying = np.zeros(ends[-1] if ends else 0, dtype=bool)
    sources, targets = [np.zeros(0, int)], [np.zeros(0, int)]
    for (producer, consumer), reach in trace.reach.items():
        if producer not in trace.leaks:
            continue
        leaks = trace.leaks[producer]
        staying[nodes[producer, "out"]] |= leaks.numpy()
        staying[nodes[consumer, "in"]] |= reach[leaks].any(0).numpy()
        channels, inputs = (reach & ~leaks[:, None]).nonzero().T.numpy()
        sources.append(nodes[producer, "out"].start + channels)
        targets.append(nodes[consumer, "in"].start + inputs)
    for consumer in trace.direct:
        if (consumer, "in") in nodes:
            staying[nodes[consumer, "in"]] = True
    source, target = np.concatenate(sources), np.concatenate(targets)
    edges = np.ones(len(source), dtype=bool)
    graph = coo_array((edges, (source, target)), shape=(len(staying), len(staying)))
    count, label = connected_components(graph, directed=False)
    stays = np.zeros(count, dtype=bool)
    stays[label[staying]] = True
    members: dict[int, dict[str, list[Channel]]] = defaultdict(lambda: {"in": [], "out": []})
    for (name, side), part in nodes.items():
        for channel, component in enumerate(label[part].tolist()):
            if not stays[component]:
                members[component][side].append((name, channel))
    groups: dict[str, list[ChannelGroup]] = defaultdict(list)
    for member in members.values():
        readers = {name for name, _ in member["in"]}
        if len(readers) == 1 and member["out"]:
            inputs = tuple(channel for _, channel in member["in"])
            groups[readers.pop()].append(ChannelGroup(inputs, tuple(member["out"])))
    return {name: some for name, some in sorted(groups.items()) if _alike(some, sizes[name, "in"])}


def _sizes(trace: Trace) -> dict[tuple[str, str], int]:
    """How many channels every producer has, and inputs every consumer, of those that meet."""
    sizes = {}
    for (producer, consumer), reach in trace.reach.items():
        if producer in trace.leaks:
            sizes[producer, "out"], sizes[consumer, "in"] = reach.shape
    return sizes


def _kind(inputs: Sequence[int], outputs: Sequence[Channel]) -> tuple[Any, ...]:
    """What groups of one kind have in common: how many inputs, and channels of which matrices."""
    return len(inputs), tuple(sorted(Counter(name for name, _ in outputs).items()))


def _alike(groups: list[ChannelGroup], width: int) -> bool:
    """Whether groups are of one kind and together hold all inputs of their reader."""
    kinds = {_kind(group.inputs, group.outputs) for group in groups}
    return len(kinds) == 1 and sum(len(group.inputs) for group in groups) == width


def interchangeable(trace: Trace, consumer: str) -> list[list[ChannelGroup]]:
    """Classes of at least two groups of a consumer's inputs that may change places.

    The sets of inputs that single channels feed are compared. Sets of one kind (of a size, fed by
    as many channels of the same matrices) that hold every input exactly once are groups. A channel
    that feeds a part of one group belongs to it; all others stay where they are, so two groups are
    in one class only if their i-th inputs are fed by the same of them. With grouped queries a group
    is a value channel with one input per query head, and a query channel, which feeds all inputs of
    its head, sets the bounds of the classes. Where several kinds would do, the groups with the
    fewest channels are taken. Nothing is interchangeable where a channel also arrives elsewhere, or
    the block's input arrives directly.
    """
    sets: dict[bytes, list[Channel]] = defaultdict(list)
    between: set[bytes] = set()
    width = 0
    for (producer, other), reach in trace.reach.items():
        if other != consumer:
            continue
        width, feeding = reach.shape[1], reach.any(1)
        packed = np.packbits(reach.numpy(), axis=1)
        if producer not in trace.leaks:
            between |= {row.tobytes() for row in packed}
            continue
        if consumer in trace.direct or (feeding & trace.elsewhere(producer, consumer)).any():
            return []
        for channel in feeding.nonzero().flatten().tolist():
            sets[packed[channel].tobytes()].append((producer, channel))
    fed = [(_members(packed, width), channels) for packed, channels in sets.items()]
    fixed = [_members(packed, width) for packed in sorted(between)]
    kinds: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
    for inputs, channels in fed:
        kinds[_kind(inputs, channels)].append(inputs)
    choices = []
    for kind in kinds.values():
        flat = [i for inputs in kind for i in inputs]
        if len(flat) == len(set(flat)) == width and (classes := _classes(kind, fed, fixed, width)):
            choices.append(classes)
    return min(choices, key=lambda c: (len(c[0][0].outputs), len(c[0][0].inputs)), default=[])


def _members(packed: bytes, width: int) -> tuple[int, ...]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=width)
    return tuple(np.flatnonzero(bits).tolist())


def _classes(
    kind: list[tuple[int, ...]],
    fed: list[tuple[tuple[int, ...], list[Channel]]],
    fixed: list[tuple[int, ...]],
    width: int,
) -> list[list[ChannelGroup]]:
    """Groups whose inputs are the sets of one kind, in classes that no other channel divides."""
    place = {i: (group, at) for group, inputs in enumerate(kind) for at, i in enumerate(inputs)}
    belonging: list[list[tuple[str, tuple[int, ...], int]]] = [[] for _ in kind]
    fixed = list(fixed)
    for inputs, channels in fed:
        owners = {place[i][0] for i in inputs}
        if len(owners) == 1:
            positions = tuple(place[i][1] for i in inputs)
            belonging[owners.pop()] += [(name, positions, channel) for name, channel in channels]
        else:
            fixed.append(inputs)
    bounds = np.zeros((width, len(fixed)), dtype=bool)
    for number, inputs in enumerate(fixed):
        bounds[list(inputs), number] = True
    bounds = np.packbits(bounds, axis=1)
    classes: dict[Any, list[ChannelGroup]] = defaultdict(list)
    for inputs, channels in sorted(zip(kind, belonging, strict=True)):
        channels.sort()
        outputs = tuple((name, channel) for name, _, channel in channels)
        bounded = tuple(bounds[i].tobytes() for i in inputs)
        sources = tuple(channel[:2] for channel in channels)
        classes[bounded, sources].append(ChannelGroup(inputs, outputs))
    return [groups for groups in classes.values() if len(groups) > 1]
