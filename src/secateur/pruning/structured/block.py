"""One block made smaller: which of its units go, what makes up for them, and its tensors in their
new shapes.

Until its end the block keeps its shape, with zeros where something will be gone; so whatever is
observed later in it comes from what was removed before. As in `block`, the copy that the stream
runs and the one that is stored change alike. Heads go before channels, since the feed-forward reads
what attention leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import MatrixReport, output_error
from secateur.methods.statistics import OF_DENSE, Stats
from secateur.methods.structures import NAMES
from secateur.models.channels.groups import ChannelGroup
from secateur.models.matrices import bias, weight_matrices
from secateur.models.replay import run_block, working_copy
from secateur.models.stream.blocks import (
    PROBE_TOKENS,
    BlockRun,
    Step,
    put,
    refuse_non_finite_weights,
)
from secateur.models.stream.forward import Batch
from secateur.models.stream.refine import Tuned, refine
from secateur.pruning.structured.channel_scores import SELECTIONS, lowest, taylor
from secateur.pruning.structured.depth import Missing, last_matrix, missing
from secateur.pruning.structured.expert_scores import EXPERTS, highest_in_groups, routed_to
from secateur.pruning.structured.feasibility import BlockCut, Consumer
from secateur.pruning.structured.method import StructuredMethod
from secateur.pruning.structured.reconstruct import NEED, reconstructed
from secateur.pruning.structured.slicing import State, without_experts, without_units
from secateur.system.tensors import count_zeros

MANY_ZEROS = 0.2
"""From this share of zeros in a matrix on, it is said that a repair fills them."""


@dataclass
class Run:
    """What every step of a run needs to know."""

    blocks: BlockRun
    shrinking: StructuredMethod

    @property
    def routing_groups(self) -> int:
        """In how many groups a router looks for experts: of every one the same number goes."""
        return getattr(self.blocks.language_model.model.config, "n_group", None) or 1


@torch.no_grad()
def smaller_block(
    step: Step, original: nn.Module, cut: BlockCut, span: Sequence[int], run: Run
) -> tuple[State, list[MatrixReport]]:
    """The tensors of a block after its units and experts are gone and what reads them is repaired,
    as stored.
    """
    refuse_non_finite_weights(step, weight_matrices(original))
    result = working_copy(original, torch.device("cpu"), None)
    gone: dict[str, list[ChannelGroup]] = {}
    reports: list[MatrixReport] = []
    kept_experts: dict[str, Tensor] = {}
    if cut.experts:
        routed = routed_to(step.block, ((h, calls[step.index]) for h, calls in step.windows()))
        for name, (_, count) in cut.experts.items():
            score = EXPERTS[run.shrinking.selections["experts"]](routed[name])
            kept_experts[name] = highest_in_groups(score, len(score) - count, run.routing_groups)
    fold = _folded_into(
        step, span, run, [n for n, c in cut.consumers.items() if c.of == "channels"]
    )
    for of in ("heads", "channels"):
        names = [name for name, consumer in cut.consumers.items() if consumer.of == of]
        if names:
            gone |= _remove(
                step, result, {n: cut.consumers[n] for n in names}, fold, span, run, reports
            )
    if span and run.shrinking.repair and not fold:
        note = f"blocks {', '.join(map(str, span))} are gone, and no matrix here is simply added that could take over"
        reports.append(MatrixReport(step.name, (0, 0), None, 0.0, None, note))
    if fold and fold not in gone:
        _remove(step, result, {fold: Consumer([], 0, "blocks")}, fold, span, run, reports)
    state = without_units(result, gone)
    return without_experts(result, state, kept_experts), reports


def refined(
    step: Step, smaller: nn.Module, state: State, span: Sequence[int], run: Run
) -> tuple[State, Tuned]:
    """The tensors of a smaller block tuned as a whole to do what the dense one does, and the span
    after it.

    `smaller` is its module in float32, which is changed. What no expert's token reaches moves by
    nothing.
    """
    batches = step.batches()
    for number in span:
        block = working_copy(
            run.blocks.language_model.blocks[number], step.device, run.blocks.dtype
        )
        calls = [calls[number] for _, calls in step.windows()]
        batches = [
            Batch(b.hidden, b.call, run_block(block, b.target.to(step.device), call))
            for b, call in zip(batches, calls, strict=True)
        ]
    started = perf_counter()
    smaller = smaller.to(step.device).float()
    names = sorted({site.parameter for site in weight_matrices(smaller).values()})
    kept = {name: torch.ones_like(smaller.get_parameter(name), dtype=torch.bool) for name in names}
    tuned = refine(smaller, kept, batches, run.shrinking.refine)
    step.seconds.refine += perf_counter() - started
    return {
        **state,
        **{n: smaller.get_parameter(n).data.to(state[n].dtype).cpu() for n in names},
    }, tuned


def _folded_into(step: Step, span: Sequence[int], run: Run, last: Sequence[str]) -> str | None:
    """The site that can take over what a span of removed blocks did; None where there is none, or
    it is not wanted.
    """
    if not run.shrinking.repair or not (span or run.shrinking.dense):
        return None
    hidden, call = step.first()
    site = last_matrix(step.block, hidden, call, last)
    return site.name if site else None


def _remove(
    step: Step,
    result: nn.Module,
    consumers: Mapping[str, Consumer],
    fold: str | None,
    span: Sequence[int],
    run: Run,
    reports: list[MatrixReport],
) -> dict[str, list[ChannelGroup]]:
    """Choose units of consumers in one forward, write zeros in their place and what makes up for
    them.
    """
    repair = run.shrinking.repair
    cross = run.shrinking.dense and fold not in consumers
    need = (NEED | (OF_DENSE if cross else set())) if repair else frozenset[str]()
    selections = {
        n: SELECTIONS[run.shrinking.selections[c.of]] for n, c in consumers.items() if c.units
    }
    need = need.union(*(selection.need for selection in selections.values()))
    if "taylor" in need:
        need = need - {"taylor"} | {"gram"}
    observed = step.observe(need | {"square"}, PROBE_TOKENS, list(consumers))
    added = None
    if fold in consumers:
        blocks = [
            (i, working_copy(run.blocks.language_model.blocks[i], step.device, run.blocks.dtype))
            for i in span
        ]
        dense = (
            [batch.target.to(step.device) for batch in step.batches()]
            if run.shrinking.dense
            else None
        )
        added = missing(step.block, blocks, str(fold), step.windows(), step.index, dense)
        del blocks
    started = perf_counter()
    gone: dict[str, list[ChannelGroup]] = {}
    targets = weight_matrices(result)
    for name, consumer in consumers.items():
        weight = targets[name].weight.to(step.device, torch.float32, copy=True)
        held = bias(result, targets[name])
        old = None if held is None else held[1].to(step.device, torch.float32, copy=True)
        stats = observed.stats.get(name)
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=step.device)
        if consumer.units:
            chosen = _choose(step, name, consumer, weight, stats, run)
            gone[name] = [consumer.units[i] for i in chosen]
            kept[[i for unit in gone[name] for i in unit.inputs]] = False
        new, new_bias = weight * kept, old
        if repair and stats is not None:
            new, new_bias = reconstructed(
                weight, stats, kept, old, added.product if added and name == fold else None
            )
        put(step, name, new, targets)
        if new_bias is not None:
            _put_bias(step, result, name, new_bias)
        note = "" if stats is not None else "no calibration token: chosen by weights"
        share = count_zeros(weight) / weight.numel()
        if repair and share > MANY_ZEROS:
            note += f"{share:.0%} of it were zeros, which the repair has filled; leave out '+repair' to keep them"
        if name == fold and span:
            note += f"{'block' if len(span) == 1 else 'blocks'} {', '.join(map(str, span))} folded into it"
        change = _change(weight, old, targets[name].weight, new_bias)
        if added and name == fold and stats is not None:
            error = _error_left(change, weight, stats, added)
        else:
            error = _error_on(change, weight, observed.probes.get(name))
        reports.append(_report(f"{step.name}.{name}", consumer, weight, error, note))
    step.seconds.solve += perf_counter() - started
    return gone


def _choose(
    step: Step, name: str, consumer: Consumer, weight: Tensor, stats: Stats | None, run: Run
) -> list[int]:
    units = consumer.inputs.to(weight.device)
    selection = SELECTIONS[run.shrinking.selections[consumer.of]]
    if stats is None:
        return lowest(weight.square().sum(0)[units].sum(1), consumer.gone).tolist()
    if "taylor" in selection.need and step.sites[name].expert:
        selection = SELECTIONS[
            "energy"
        ]  # an expert's output is added: to first order they are the same
    if "taylor" in selection.need:
        batches = ((h, calls[step.index]) for h, calls in step.windows())
        block = working_copy(step.block, step.device, torch.float32)
        stats = Stats(
            stats.tokens,
            {**stats.sums, "taylor": taylor(block, name, units, batches).to(weight.device)},
        )
    return selection.choose(weight, stats, units, consumer.gone).tolist()


def _put_bias(step: Step, result: nn.Module, name: str, values: Tensor) -> None:
    """Write a bias `[out]` into both copies of the block, rounded as it is stored."""
    for block in (result, step.block):
        held, stored = (
            bias(block, weight_matrices(block)[name]),
            bias(result, weight_matrices(result)[name]),
        )
        assert held is not None
        assert stored is not None
        held[1].copy_(values.to(stored[1].dtype))


def _change(weight: Tensor, old: Tensor | None, new: Tensor, new_bias: Tensor | None) -> Tensor:
    """What a matrix lost, `[out, in]` float32, and what its bias lost as one more column."""
    change = weight - new.to(weight.device, torch.float32)
    bias_change = (
        torch.zeros(len(weight), device=weight.device)
        if old is None or new_bias is None
        else old - new_bias
    )
    return torch.cat([change, bias_change[:, None]], 1)


def _error_on(change: Tensor, weight: Tensor, probe: Tensor | None) -> float | None:
    """The output error of a change relative to the output, on inputs `[tokens, in]`."""
    if probe is None:
        return None
    ones = torch.ones_like(probe[:, :1])
    return output_error(torch.cat([probe, ones], 1), change, nn.functional.pad(weight, (0, 1)))


def _error_left(change: Tensor, weight: Tensor, stats: Stats, added: Missing) -> float:
    """The same where δ should have been added: E‖change x + δ‖² relative to E‖W x‖², over all
    tokens.
    """
    gram, mean = stats.mean("gram"), stats.mean("sum")
    gram = torch.cat([gram, mean[None]])
    gram = torch.cat([gram, torch.cat([mean, torch.ones_like(mean[:1])])[:, None]], 1).to(
        change.device
    )
    change, weight, gram = (
        change.double(),
        weight.double(),
        gram.double(),
    )  # float32 overflows on spoilt weights
    left = ((change @ gram + 2 * added.product.to(change)) * change).sum().item() + added.power
    output = ((weight @ gram[:-1, :-1]) * weight).sum().clamp_min(1e-30).item()
    return max(left, 0.0) / output


def _report(
    name: str, consumer: Consumer, weight: Tensor, error: float | None, note: str
) -> MatrixReport:
    total = len(consumer.units)
    left = total - consumer.gone
    size = len(consumer.units[0].inputs) if total else 0
    inputs = left * size if total else weight.shape[1]
    pattern = f"{left} of {total} {NAMES[consumer.of]} kept" if total else None
    return MatrixReport(name, (weight.shape[0], inputs), pattern, 0.0, error, note)
