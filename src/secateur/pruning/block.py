"""One block: the statistics of its inputs, then the method, site by site; what comes out is ready
to be written.

Two copies of the block are changed alike: the one in the dtype of the forward passes, on which the
stream goes on, and one as it is stored, which is the result. What is pruned is the stored weight,
whatever dtype the forward has.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import LEFT_OUT, UNSEEN, MatrixReport, output_error
from secateur.methods import Method, prune_together, solved_together
from secateur.methods.patterns import NM, Pattern
from secateur.methods.statistics import Stats
from secateur.models.channels.groups import ChannelGroup
from secateur.models.matrices import WeightMatrix, weight_matrices
from secateur.models.replay import working_copy
from secateur.models.stream.blocks import PROBE_TOKENS, Step, put, refuse_non_finite_weights
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.models.stream.observe import CalibrationStatistics
from secateur.models.stream.refine import Tuned, refine
from secateur.pruning.permute import input_order, permuted, reorder, verified
from secateur.pruning.planning.allocation import Plan
from secateur.system.memory import release_memory
from secateur.system.tensors import count_zeros

Classes = list[list[ChannelGroup]]


@dataclass
class PrunedBlock:
    """A finished block: the parameters that changed, by their name in the model, in the dtype they
    are stored in.
    """

    index: int
    tensors: dict[str, Tensor]
    reports: list[MatrixReport]
    tuned: Tuned | None = None

    def entry(self, name: str) -> dict[str, Any]:
        """What `Report.take` takes, as JSON can hold it."""
        return {
            "block": name,
            "sites": [asdict(site) for site in self.reports],
            "refined": self.tuned,
        }


@torch.no_grad()
def prune_block(
    step: Step,
    original: nn.Module,
    method: Method,
    plan: Plan,
    at_hand: Callable[[str], None],
    units: Mapping[str, Classes],
    *,
    one_pass: bool,
    ranks: Ranks = ALONE,
) -> PrunedBlock:
    """Prune the sites of one block after `plan`; `at_hand` is told the name of each. Raises
    NonFinite.

    `units` are those that may change places, by the site that reads them; only for a method that
    permutes. `one_pass`: see `Step.stages`. Every one of several `ranks` solves its share of the
    sites.
    """
    result = working_copy(original, torch.device("cpu"), None)
    if units:
        original = working_copy(original, torch.device("cpu"), None)  # will be permuted as well
        units = verified(step.block, *step.first(), units)
    dense, targets = weight_matrices(original), weight_matrices(result)
    refuse_non_finite_weights(step, dense)
    moved: set[str] = set()  # parameters of which rows or columns changed places
    notes: dict[str, str] = {}  # of every site that was pruned
    probes: dict[str, Tensor] = {}
    wanted = {name for name in step.sites if f"{step.name}.{name}" in plan}
    stages = step.stages(
        method.need,
        PROBE_TOKENS,
        wanted,
        one_pass=one_pass,
        sequential=method.sequential,
        again=method.refine > 0,
    )

    def solve(group: Sequence[str], observed: CalibrationStatistics) -> dict[str, str]:
        """Prune the sites of a group in both copies; the notes on those that were."""
        said: dict[str, str] = {}
        for names in solved_together(method, group, observed.stats):
            stats = observed.stats.get(names[0], Stats(0, {}))
            chosen = {name: plan[f"{step.name}.{name}"] for name in names}
            if method.need and not stats.tokens:
                continue
            at_hand(f"{step.name}.{names[0]}")
            name = names[0]
            order = (
                _order(dense[name], method, stats, chosen[name], units.get(name))
                if len(names) == 1
                else None
            )
            if order is not None:
                stats, said[name] = permuted(stats, order), "inputs permuted"
                if name in probes:  # the first batch may have missed an expert
                    probes[name] = probes[name][:, order]
                for copy in (step.block, result, original):
                    moved.update(reorder(copy, name, units[name], order))
            weights = [
                dense[name].weight.to(step.device).to(torch.float32, copy=True) for name in chosen
            ]
            found = prune_together(method, weights, stats, list(chosen.values()))
            for name, pruned in zip(chosen, found, strict=True):
                put(step, name, pruned.weight, targets)
                said[name] = ", ".join(note for note in (said.get(name, ""), pruned.note) if note)
        return said

    for group, observed in stages:
        probes |= observed.probes
        started = perf_counter()
        for said in ranks.together(partial(solve, ranks.mine(group), observed)):
            notes |= said
        if ranks.size > 1:
            for position, name in enumerate(group):
                if name in notes:
                    stored = ranks.hand_round(targets[name].stored, position % ranks.size)
                    for copy in (targets, step.sites):
                        copy[name].stored.copy_(stored)
        step.seconds.solve += perf_counter() - started
    release_memory()
    changed = sorted({step.sites[name].parameter for name in notes})
    tuned = None
    if method.refine and changed:
        at_hand(f"{step.name} as a whole")
        tuned = _refine(step, result, changed, notes, method.refine)
    reports = [
        _report(
            f"{step.name}.{name}",
            dense[name],
            targets[name],
            plan,
            notes.get(name),
            probes.get(name),
        )
        for name in step.sites
    ]
    tensors = {
        f"{step.name}.{name}": result.get_parameter(name).data
        for name in sorted(moved.union(changed))
    }
    return PrunedBlock(step.index, tensors, reports, tuned)


def _order(
    site: WeightMatrix, method: Method, stats: Stats, pattern: Pattern, classes: Classes | None
) -> Tensor | None:
    """The order in which a site's inputs should come, or None to leave them; only N:M has anything
    to gain.
    """
    if classes is None or not isinstance(pattern, NM):
        return None
    return input_order(method.score(site.weight.float(), stats), classes, pattern)


def _refine(
    step: Step, result: nn.Module, changed: Sequence[str], pruned: Container[str], epochs: int
) -> Tuned:
    """Tune the pruned sites of the block, in float32, and round what came out into both copies."""
    batches = step.batches()
    started = perf_counter()
    block = working_copy(step.block, step.device, torch.float32)
    for name in changed:
        block.get_parameter(name).data.copy_(result.get_parameter(name).data)
    kept = {name: block.get_parameter(name) != 0 for name in changed}
    for site in weight_matrices(block).values():
        if site.expert and site.parameter in kept and site.name not in pruned:
            kept[site.parameter][int(site.name.rsplit(".", 2)[1])] = False
    tuned = refine(block, kept, batches, epochs)
    for name in changed:
        stored = result.get_parameter(name).data.copy_(block.get_parameter(name).data)
        step.block.get_parameter(name).data.copy_(stored)
    step.seconds.refine += perf_counter() - started
    return tuned


def _report(
    name: str,
    dense: WeightMatrix,
    target: WeightMatrix,
    plan: Plan,
    note: str | None,
    probe: Tensor | None,
) -> MatrixReport:
    """What became of a site; `note` is None where it was not pruned."""
    rows, columns = target.weight.shape
    share = count_zeros(target.weight) / (rows * columns)
    if note is None:
        return MatrixReport(
            name, (rows, columns), None, share, None, UNSEEN if name in plan else LEFT_OUT
        )
    error = None
    if probe is not None:
        before, after = (site.weight.to(probe.device).float() for site in (dense, target))
        error = output_error(probe, before - after, before)
    return MatrixReport(name, (rows, columns), str(plan[name]), share, error, note)
