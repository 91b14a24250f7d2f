"""Channel permutation for N:M: an order of a matrix's inputs in which the pattern can keep more of
what matters.

N:M removes from every group of M neighbours, also where all of them matter. Which inputs are
neighbours is free wherever whoever makes them can be reordered too (`groups`): the sum over the
inputs does not change, and neither does the file, so the permutation costs nothing when the model
runs.

The order is found as in Plug-and-Play (Zhang et al., ICLR 2024, sec. 4): deal out the columns by
total score, then improve by linear sum assignment. Columns move for all rows at once, so the best
order is a hard problem; this finds a good one. What no trace can see is compared in numbers
(`same_output`, `verified`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from secateur.methods.patterns import NM, Pattern
from secateur.methods.statistics import Stats
from secateur.models.channels.groups import ChannelGroup, interchangeable_groups
from secateur.models.hooks import recorded_inputs
from secateur.models.matrices import WeightMatrix, bias, signature, weight_matrices
from secateur.models.replay import Call, close, run_block
from secateur.models.stream.blocks import BlockRun, Step

Classes = list[list[ChannelGroup]]
"""Channels that may change places, class by class."""

ROUNDS = 4
"""How often every position is reassigned, at most; it stops sooner where a round gains less than
0.05 %.
"""
GROUPS = 256
"""How many groups are assigned together, at most: assignment costs their number cubed."""


def best_order(score: Tensor, pattern: NM) -> Tensor:
    """The order of columns, int64 `[columns]`, in which N:M keeps most of a score `[rows,
    columns]`, or nearly.

    Never worse than the order as it is, which is returned where no better one is found.
    Deterministic. A matrix of 4096 x 11008 takes about half a minute on one core, and the memory of
    one more score in float32.
    """
    columns = score.shape[1]
    pattern.check((len(score), columns), "score")
    identity = torch.arange(columns)
    by_column = score.T.float().contiguous()  # [columns, rows]
    groups = _dealt(by_column.sum(1, dtype=torch.float64).cpu(), pattern.m)  # [groups, m]
    kept = kept_score(by_column, groups, pattern.n)
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        before = kept
        for part in torch.randperm(len(groups), generator=generator).split(GROUPS):
            groups[part] = _reassigned(by_column, groups[part], pattern.n)
        kept = kept_score(by_column, groups, pattern.n)
        if kept <= before * (1 + 5e-4):
            break
    groups = groups.sort(1).values
    groups = groups[groups[:, 0].argsort()]
    as_it_is = kept_score(by_column, identity.view(-1, pattern.m), pattern.n)
    return groups.flatten() if kept > as_it_is else identity


def kept_score(by_column: Tensor, groups: Tensor, n: int) -> float:
    """The score that remains where each row keeps n columns of every group: scores `[columns,
    rows]`, `[groups, m]`.
    """
    groups = groups.to(by_column.device)
    kept = [
        sum(x.sum(dtype=torch.float64) for x in _largest(by_column[part], n))
        for part in groups.split(GROUPS)
    ]
    return float(sum(kept))


def _largest(values: Tensor, n: int) -> list[Tensor]:
    """The n largest along dimension 1 of `[groups, columns, rows]`, largest first: each `[groups,
    rows]`.

    So few are compared here that passing the larger one on is several times faster than topk.
    """
    columns = list(values.unbind(1))
    for done in range(n):
        for i in range(len(columns) - 1, done, -1):
            low, high = (
                torch.minimum(columns[i - 1], columns[i]),
                torch.maximum(columns[i - 1], columns[i]),
            )
            columns[i - 1], columns[i] = high, low
    return columns[:n]


def _dealt(total: Tensor, m: int) -> Tensor:
    """Groups `[columns / m, m]`: columns in falling order of their total, dealt to the groups forth
    and back.
    """
    rounds = total.argsort(descending=True, stable=True).view(m, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _reassigned(by_column: Tensor, groups: Tensor, n: int) -> Tensor:
    """Groups `[groups, m]` after taking one column out of each and putting them back at their best,
    m times.

    Where the n-th largest of the others is t, a column of value v adds max(v - t, 0) to what a row
    keeps.
    """
    groups = groups.clone()
    for position in range(groups.shape[1]):
        out, rest = (
            groups[:, position],
            groups[:, [i for i in range(groups.shape[1]) if i != position]],
        )
        threshold = _largest(by_column[rest.to(by_column.device)], n)[-1]  # [groups, rows]
        values = by_column[out.to(by_column.device)]  # [columns taken out, rows]
        gain = torch.stack(
            [(values - t).clamp_min_(0).sum(1) for t in threshold]
        )  # [groups, columns taken out]
        _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
        groups[:, position] = out[torch.from_numpy(chosen)]
    return groups


def input_order(score: Tensor, classes: Classes, pattern: NM) -> Tensor | None:
    """The order of a consumer's inputs, int64 `[in]`, that keeps most score `[out, in]`, or None to
    leave it.

    Columns move within a class of units only. A unit with several inputs (one per query head) moves
    in all places at once: their scores are stacked as further rows. A class is permuted only where
    the i-th inputs of its units, for each i, fill whole groups of M neighbours; otherwise a group
    would mix them with what stays.
    """
    order = torch.arange(score.shape[1])
    for units in classes:
        inputs = torch.tensor([unit.inputs for unit in units])  # [units, places]
        start = inputs[0]
        in_line = (inputs == start + torch.arange(len(units))[:, None]).all()
        if not in_line or len(units) % pattern.m or (start % pattern.m).any():
            continue
        stacked = torch.cat([score[:, first : first + len(units)] for first in start.tolist()])
        order[inputs] = inputs[best_order(stacked, pattern)]
    return None if torch.equal(order, torch.arange(len(order))) else order


@torch.no_grad()
def reorder(block: nn.Module, consumer: str, classes: Classes, order: Tensor) -> list[str]:
    """Give a consumer's inputs another order, and whatever feeds them; returns the parameters that
    changed, by name.

    Input i becomes what was input `order[i]`, for int64 `[in]`. Parameters are written in place, so
    the matrices of the block stay views of them. An order that does not move whole units within
    their classes is an AssertionError.
    """
    known = weight_matrices(block)
    changed = [known[consumer].parameter]
    rows = _output_orders(known, classes, order)
    weight = known[consumer].weight
    weight.copy_(weight[:, order.to(weight.device)])
    for name, moved in rows.items():
        matrix = known[name]
        matrix.weight.copy_(matrix.weight[moved.to(matrix.weight.device)])
        changed.append(matrix.parameter)
        if (named := bias(block, matrix)) is not None:
            parameter, values = named
            values.copy_(values[moved.to(values.device)])
            changed.append(parameter)
    return list(dict.fromkeys(changed))


def _output_orders(
    known: Mapping[str, WeightMatrix], classes: Classes, order: Tensor
) -> dict[str, Tensor]:
    """For every matrix that feeds what moves, the order of its outputs, int64 `[out]`."""
    rows: dict[str, Tensor] = {}
    left = order.tolist()
    for units in classes:
        by_inputs = {unit.inputs: unit for unit in units}
        for unit in units:
            source = by_inputs.get(tuple(left[i] for i in unit.inputs))
            assert source is not None, "an order moves whole units within their class"
            for i in unit.inputs:
                left[i] = i
            if source is unit:
                continue
            for (name, channel), (_, origin) in zip(unit.outputs, source.outputs, strict=True):
                rows.setdefault(name, torch.arange(known[name].weight.shape[0]))[channel] = origin
    assert left == list(range(len(left))), "an order moves units of its classes only"
    return rows


def permuted(stats: Stats, order: Tensor) -> Stats:
    """What the statistics would be had the inputs come in this order, int64 `[in]`."""
    sums = {}
    for name, total in stats.sums.items():
        at = order.to(total.device)
        sums[name] = total[at] if total.dim() == 1 else total[at][:, at]
    return Stats(stats.tokens, sums)


@torch.no_grad()
def same_output(
    before: nn.Module, after: nn.Module, consumer: str, order: Tensor, hidden: Tensor, call: Call
) -> bool:
    """Whether a reordered block does what it did: its output is the same, and the consumer's inputs
    but their order.

    The inputs are compared channel by channel, since a small part of a block vanishes beside the
    residual stream. An expert that no token of `hidden` reaches is not compared.
    """
    outputs, inputs = [], []
    for block in (before, after):
        seen: list[Tensor] = []
        with recorded_inputs(
            block, lambda name, x, seen=seen: seen.append(x) if name == consumer else None
        ):
            outputs.append(run_block(block, hidden, call))
        inputs.append(seen)
    if len(inputs[0]) != len(inputs[1]) or not close(outputs[0], outputs[1]):
        return False
    at = order.to(hidden.device)
    return all(x.shape == y.shape and close(x[..., at], y) for x, y in zip(*inputs, strict=True))


@torch.no_grad()
def verified(
    block: nn.Module, hidden: Tensor, call: Call, classes: Mapping[str, Classes]
) -> dict[str, Classes]:
    """Those consumers of a block whose units may really change places: moving each by one changes
    nothing.

    On the hidden state that enters the block (`entering`, a few tokens are enough) and its call,
    one consumer at a time, on a copy. Best in float32. What one block of a kind may do another may
    not, where a scale differs. No random order is tried: of few units it may happen to move only
    those that are alike.
    """
    moving = {}
    for consumer, units in classes.items():
        order = torch.arange(weight_matrices(block)[consumer].weight.shape[1])
        for alike in units:
            places = torch.tensor([unit.inputs for unit in alike])  # [units, inputs of each]
            order[places] = places.roll(1, 0)
        if not units:
            continue
        copy = deepcopy(block)
        reorder(copy, consumer, units, order)
        if same_output(block, copy, consumer, order, hidden, call):
            moving[consumer] = units
    return moving


class Permutation:
    """Better orders for the inputs of a block's weight matrices, given to all its copies alike.

    `copies` of the block are the working copy of `step`, the one as it is stored, and the original
    that weights are taken from. `moved`: parameters of which rows or columns have changed places.
    """

    def __init__(
        self, step: Step, copies: Sequence[nn.Module], classes: Mapping[str, Classes]
    ) -> None:
        self.copies, self.moved = copies, set[str]()
        self.classes = verified(step.block, *step.inputs.first(), classes)

    def apply(
        self,
        name: str,
        score: Callable[[Stats], Tensor],
        stats: Stats,
        pattern: Pattern,
        probes: dict[str, Tensor],
    ) -> tuple[Stats, str]:
        """Reorder the inputs of one matrix, where N:M can keep more of `score(stats)` `[out, in]`
        by it; the statistics in the new order, and a note. Its probe is reordered as well.
        """
        if name not in self.classes or not isinstance(pattern, NM):
            return stats, ""
        order = input_order(score(stats), self.classes[name], pattern)
        if order is None:
            return stats, ""
        if name in probes:  # the first batch may have missed an expert
            probes[name] = probes[name][:, order]
        for copy in self.copies:
            self.moved.update(reorder(copy, name, self.classes[name], order))
        return permuted(stats, order), "inputs permuted"


def groups_by_kind(run: BlockRun) -> Callable[[Step], dict[str, Classes]]:
    """A function that gives the channels of a block that may change places, by the matrix that
    reads them; blocks of one kind are traced once.
    """
    kinds: dict[Any, dict[str, Classes]] = {}

    def find(step: Step) -> dict[str, Classes]:
        blocks = run.language_model.blocks
        if (kind := signature(blocks[step.index])) not in kinds:
            run.progress.advance(f"{step.name} traced", step.index, len(blocks))
            device = run.devices[0]
            kinds[kind] = interchangeable_groups(run.language_model, step.index, device)
        return kinds[kind]

    return find
