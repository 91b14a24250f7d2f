"""Which channels of a block belong together, and which of those may change places.

What feeds the same inputs of a site and nothing else is a unit: a feed-forward channel is one row
of the gate, one row of the up matrix and one column of the down matrix. Units that nothing else
tells apart may be permuted for free (`permute`); a unit may also be taken out as a whole. All of it
follows from where channels arrive (`trace`), so it is true as far as that goes: compare numbers
afterwards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.models.channels.trace import Trace
from secateur.models.channels.trace import trace as trace_block
from secateur.models.replay import LanguageModel


@dataclass(frozen=True)
class ChannelGroup:
    """Inputs of a consumer, and the (site, output channel) pairs that feed these inputs or some of
    them, and no other.

    In a class of units (`interchangeable`) the i-th input and the i-th output of one correspond to
    those of another.
    """

    inputs: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]


def interchangeable_groups(
    language_model: LanguageModel, index: int, device: torch.device
) -> dict[str, list[list[ChannelGroup]]]:
    """The exchangeable units of every site of a block that has any; traced in float32."""
    found = trace_block(language_model, index, device=device, dtype=torch.float32)
    readers = {consumer for _, consumer in found.reach}
    return {name: units for name in sorted(readers) if (units := interchangeable(found, name))}


def removable_groups(trace: Trace) -> dict[str, list[ChannelGroup]]:
    """The units that can be taken out whole, by the site that reads them; a site's units are all of
    one size.

    Channels and inputs that meet belong together, and so does whatever meets one of them: a
    feed-forward channel, or a key-value head with the query heads that read it. What also arrives
    elsewhere, or is reached from the block's own input, stays. So do the units of a site that are
    not all alike, and what one site feeds to several.
    """
    starts, total = {}, 0  # every channel and every input is a node
    for key, size in _sizes(trace).items():
        starts[key] = total
        total += size
    sources, targets = [], []
    held = np.zeros(total, dtype=bool)
    for (producer, consumer), reach in trace.reach.items():
        if producer not in trace.leaks:
            continue
        leaks = trace.leaks[producer]
        held[starts[consumer, "in"] + reach[leaks].any(0).nonzero().flatten().numpy()] = True
        channels, inputs = (reach & ~leaks[:, None]).nonzero().T.numpy()
        sources.append(starts[producer, "out"] + channels)
        targets.append(starts[consumer, "in"] + inputs)
    for producer, leaks in trace.leaks.items():
        if (producer, "out") in starts:
            held[starts[producer, "out"] + leaks.nonzero().flatten().numpy()] = True
    for consumer in trace.direct:
        if (consumer, "in") in starts:
            held[
                starts[consumer, "in"] : starts[consumer, "in"] + _sizes(trace)[consumer, "in"]
            ] = True
    ends = np.concatenate(sources or [[]]).astype(int), np.concatenate(targets or [[]]).astype(int)
    graph = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(total, total))
    count, label = connected_components(graph, directed=False)
    stays = np.zeros(count, dtype=bool)
    stays[label[held]] = True
    members: dict[int, tuple[list[tuple[str, int]], list[tuple[str, int]]]] = defaultdict(
        lambda: ([], [])
    )
    for (name, way), size in _sizes(trace).items():
        for channel, component in enumerate(
            label[starts[name, way] : starts[name, way] + size].tolist()
        ):
            if not stays[component]:
                members[component][way == "out"].append((name, channel))
    found: dict[str, list[ChannelGroup]] = defaultdict(list)
    for inputs, outputs in members.values():
        readers = {name for name, _ in inputs}
        if len(readers) == 1 and outputs:
            found[readers.pop()].append(ChannelGroup(tuple(i for _, i in inputs), tuple(outputs)))
    return {
        name: units
        for name, units in sorted(found.items())
        if _alike(units, _sizes(trace)[name, "in"])
    }


def _sizes(trace: Trace) -> dict[tuple[str, str], int]:
    """How many channels every producer has, and inputs every consumer, of those that meet."""
    sizes = {}
    for (producer, consumer), reach in trace.reach.items():
        if producer in trace.leaks:
            sizes[producer, "out"], sizes[consumer, "in"] = reach.shape
    return sizes


def _alike(units: list[ChannelGroup], width: int) -> bool:
    """Whether units are of one kind and together hold all inputs of their reader."""
    kinds = {
        (len(unit.inputs), tuple(sorted(Counter(site for site, _ in unit.outputs).items())))
        for unit in units
    }
    return len(kinds) == 1 and sum(len(unit.inputs) for unit in units) == width


def interchangeable(trace: Trace, consumer: str) -> list[list[ChannelGroup]]:
    """Classes of at least two units of a consumer's inputs that may change places among each other.

    The sets of inputs that single channels feed are compared. Sets of one kind (of a size, fed by
    as many channels of the same sites) that hold every input exactly once are units. A channel that
    feeds a part of one unit belongs to it; all others stay where they are, so two units are in one
    class only if their i-th inputs are fed by the same of them. With grouped queries a unit is a
    value channel with one input per query head, and a query channel, which feeds all inputs of its
    head, sets the bounds of the classes. Where several kinds would do, the units with the fewest
    channels are taken. Nothing is exchangeable where a channel also arrives elsewhere, or the
    block's input arrives directly.
    """
    sets: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
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
        kinds[len(inputs), tuple(sorted(Counter(site for site, _ in channels).items()))].append(
            inputs
        )
    found = []
    for kind in kinds.values():
        flat = [i for inputs in kind for i in inputs]
        if len(flat) == len(set(flat)) == width and (classes := _classes(kind, fed, fixed, width)):
            found.append(classes)
    return min(
        found,
        key=lambda classes: (len(classes[0][0].outputs), len(classes[0][0].inputs)),
        default=[],
    )


def _members(packed: bytes, width: int) -> tuple[int, ...]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=width)
    return tuple(np.flatnonzero(bits).tolist())


def _classes(
    kind: list[tuple[int, ...]],
    fed: list[tuple[tuple[int, ...], list[tuple[str, int]]]],
    fixed: list[tuple[int, ...]],
    width: int,
) -> list[list[ChannelGroup]]:
    """Units whose inputs are the sets of one kind, in classes that no other channel tells apart."""
    place = {
        i: (unit, position) for unit, inputs in enumerate(kind) for position, i in enumerate(inputs)
    }
    belonging: list[list[tuple[str, tuple[int, ...], int]]] = [[] for _ in kind]
    fixed = list(fixed)
    for inputs, channels in fed:
        owners = {place[i][0] for i in inputs}
        if len(owners) == 1:
            positions = tuple(place[i][1] for i in inputs)
            belonging[owners.pop()] += [(site, positions, channel) for site, channel in channels]
        else:
            fixed.append(inputs)
    bounds = np.zeros((width, len(fixed)), dtype=bool)
    for number, inputs in enumerate(fixed):
        bounds[list(inputs), number] = True
    bounds = np.packbits(bounds, axis=1)
    classes: dict[Any, list[ChannelGroup]] = defaultdict(list)
    for inputs, channels in sorted(zip(kind, belonging, strict=True)):
        channels.sort()
        alike = (
            tuple(bounds[i].tobytes() for i in inputs),
            tuple(channel[:2] for channel in channels),
        )
        classes[alike].append(
            ChannelGroup(inputs, tuple((site, channel) for site, _, channel in channels))
        )
    return [units for units in classes.values() if len(units) > 1]
