"""Which channels of a block belong together, and which of those may change places.

What feeds the same inputs of a site and nothing else is a unit: a feed-forward channel is one row of the gate, one
row of the up matrix and one column of the down matrix. Units that nothing else tells apart may be permuted for free
(`permute`); a unit may also be taken out as a whole. All of it follows from where channels arrive (`trace`), so it
is true as far as that goes: compare numbers afterwards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secateur.model import LanguageModel
from secateur.trace import Trace
from secateur.trace import trace as trace_block


@dataclass(frozen=True)
class Unit:
    """Inputs of a consumer, and the (site, output channel) pairs that feed these inputs or some of them, and no other.

    In a class of units (`exchangeable`) the i-th input and the i-th output of one correspond to those of another.
    """

    inputs: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]


def movable(language_model: LanguageModel, index: int, device: torch.device) -> dict[str, list[list[Unit]]]:
    """The exchangeable units of every site of a block that has any; traced in float32."""
    found = trace_block(language_model, index, device=device, dtype=torch.float32)
    readers = {consumer for _, consumer in found.reach}
    return {name: units for name in sorted(readers) if (units := exchangeable(found, name))}


def exchangeable(trace: Trace, consumer: str) -> list[list[Unit]]:
    """Classes of at least two units of a consumer's inputs that may change places among each other.

    The sets of inputs that single channels feed are compared. Sets of one kind (of a size, fed by as many channels of
    the same sites) that hold every input exactly once are units. A channel that feeds a part of one unit belongs to
    it; all others stay where they are, so two units are in one class only if their i-th inputs are fed by the same of
    them. With grouped queries a unit is a value channel with one input per query head, and a query channel, which
    feeds all inputs of its head, sets the bounds of the classes. Where several kinds would do, the units with the
    fewest channels are taken. Nothing is exchangeable where a channel also arrives elsewhere, or the block's input
    arrives directly.
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
        kinds[len(inputs), tuple(sorted(Counter(site for site, _ in channels).items()))].append(inputs)
    found = []
    for kind in kinds.values():
        flat = [i for inputs in kind for i in inputs]
        if len(flat) == len(set(flat)) == width and (classes := _classes(kind, fed, fixed, width)):
            found.append(classes)
    return min(found, key=lambda classes: (len(classes[0][0].outputs), len(classes[0][0].inputs)), default=[])


def _members(packed: bytes, width: int) -> tuple[int, ...]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=width)
    return tuple(np.flatnonzero(bits).tolist())


def _classes(
    kind: list[tuple[int, ...]],
    fed: list[tuple[tuple[int, ...], list[tuple[str, int]]]],
    fixed: list[tuple[int, ...]],
    width: int,
) -> list[list[Unit]]:
    """Units whose inputs are the sets of one kind, in classes that no other channel tells apart."""
    place = {i: (unit, position) for unit, inputs in enumerate(kind) for position, i in enumerate(inputs)}
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
    classes: dict[Any, list[Unit]] = defaultdict(list)
    for inputs, channels in sorted(zip(kind, belonging, strict=True)):
        channels.sort()
        alike = tuple(bounds[i].tobytes() for i in inputs), tuple(channel[:2] for channel in channels)
        classes[alike].append(Unit(inputs, tuple((site, channel) for site, _, channel in channels)))
    return [units for units in classes.values() if len(units) > 1]
