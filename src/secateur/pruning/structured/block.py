"""One block made smaller: which of its channels go, what makes up for them, and its tensors in
their new shapes.

Until its end the block keeps its shape, with zeros where channels will be removed; so whatever is
observed later in it comes from what was removed before. As in `pruning.block`, the copy that the
stream runs and the one that is stored change alike. Heads go before channels, since the
feed-forward reads what attention leaves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import MatrixReport, output_error
from secateur.errors import UnsupportedModel
from secateur.methods.statistics import OF_DENSE, Stats
from secateur.methods.structures import NAMES
from secateur.models.channels.groups import ChannelGroup
from secateur.models.kept import matrix_parameters
from secateur.models.matrices import bias, put, refuse_non_finite_weights, weight_matrices
from secateur.models.replay import Call, run_block, working_copy
from secateur.models.stream.blocks import PROBE_TOKENS, BlockRun, Step
from secateur.models.stream.observe import CalibrationStatistics
from secateur.models.stream.refine import Tuned, refine, shared_out, steps_on
from secateur.pruning.structured.channel_scores import SELECTIONS, lowest, taylor
from secateur.pruning.structured.depth import Missing, last_matrix, missing
from secateur.pruning.structured.expert_merging import merge
from secateur.pruning.structured.expert_scores import EXPERTS, highest_in_groups, routed_to
from secateur.pruning.structured.feasibility import BlockRemoval, Choice
from secateur.pruning.structured.method import StructuredMethod
from secateur.pruning.structured.reconstruct import NEED, reconstructed
from secateur.pruning.structured.slicing import State, without_experts, without_groups
from secateur.system.tensors import count_zeros

MANY_ZEROS = 0.2
"""From this share of zeros in a matrix on, it is said that the reconstruction fills them."""


@dataclass
class BlockSlicer:
    """A block that is being made smaller, and the `span` of blocks that are removed behind it.

    `stored` is the copy that is written, in the dtype it is stored in; `step.block` the one that
    the stream runs. `absorbing` is the name of the matrix that takes over what the span did.
    """

    step: Step
    original: nn.Module
    span: Sequence[int]
    run: BlockRun
    method: StructuredMethod
    reports: list[MatrixReport] = field(default_factory=list)
    absorbing: str | None = None

    @torch.no_grad()
    def remove(self, removal: BlockRemoval) -> State:
        """The tensors of the block, as stored, with less in it and with what makes up for that."""
        refuse_non_finite_weights(self.step.name, weight_matrices(self.original))
        self.stored = working_copy(self.original, torch.device("cpu"), None)
        by_kind: dict[str, dict[str, Choice]] = {"heads": {}, "channels": {}, "experts": {}}
        for name, choice in removal.items():
            by_kind[choice.of][name] = choice
        experts = by_kind.pop("experts")
        kept_experts = self._kept_experts(experts) if experts else {}
        if self.method.reconstruct and (self.span or self.method.dense_target):
            last = last_matrix(
                self.step.block, *self.step.inputs.first(), list(by_kind["channels"])
            )
            self.absorbing = last.name if last else None
        removed: dict[str, list[ChannelGroup]] = {}
        for some in filter(None, by_kind.values()):
            removed |= self._remove_groups(some)
        if self.span and self.method.reconstruct and not self.absorbing:
            note = (
                f"blocks {', '.join(map(str, self.span))} are gone, and no matrix here is simply "
                "added that could take over"
            )
            self.reports.append(MatrixReport(self.step.name, (0, 0), None, 0.0, None, note))
        if self.absorbing and self.absorbing not in removed:
            self._remove_groups({self.absorbing: Choice("blocks", 0)})
        return without_experts(self.stored, without_groups(self.stored, removed), kept_experts)

    def refine(self, smaller: nn.Module, state: State) -> tuple[State, Tuned]:
        """The tensors of the smaller block, tuned to do what the dense one and the span after it
        do.

        `smaller` is its module in float32, which is changed. What no expert's token reaches moves
        by nothing.
        """
        step = self.step
        batches = step.batches()
        for number, block in self._span_blocks():
            calls = [calls[number] for _, calls in step.inputs.windows()]
            batches = [
                b._replace(target=run_block(block, b.target.to(step.device), call))
                for b, call in zip(batches, calls, strict=True)
            ]
        seen, judged = shared_out(batches)
        with step.seconds.counted("refine"):
            smaller = smaller.to(step.device).float()
            parameters = matrix_parameters(smaller)
            kept = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
            tuned = refine(smaller, kept, seen, judged, steps_on(self.method.refine, len(seen)))
        tuned.refuse_non_finite(step.name)
        return state | {n: p.data.to(state[n].dtype).cpu() for n, p in parameters.items()}, tuned

    def _span_blocks(self) -> list[tuple[int, nn.Module]]:
        """Working copies of the blocks that are removed behind this one, with their numbers."""
        blocks = self.run.language_model.blocks
        return [(i, working_copy(blocks[i], self.step.device, self.run.dtype)) for i in self.span]

    def _kept_experts(self, removal: BlockRemoval) -> dict[str, Tensor]:
        masks, merging = self.step.inputs.masks(), self.method.merges
        routed = routed_to(self.step.block, self._batches(), masks, merging=merging)
        # of every group in which a router looks for experts the same number goes
        groups = getattr(self.run.language_model.text_config, "n_group", None) or 1
        kept: dict[str, Tensor] = {}
        for name, choice in removal.items():
            if name not in routed:
                raise UnsupportedModel(
                    f"No token of the text reaches {self.step.name}.{name}, as of experts for "
                    "pictures, so which of its experts could go is not known. Take channels, heads "
                    "or blocks out, or use a pattern of zeros."
                )
            score = EXPERTS[self.method.selections["experts"]](routed[name])
            kept[name] = highest_in_groups(score, choice.left, groups)
            if merging:
                module, stored = (m.get_submodule(name) for m in (self.step.block, self.stored))
                merge(module, stored, routed[name], score, kept[name], groups)
        return kept

    def _batches(self) -> Iterator[tuple[Tensor, Call]]:
        """The hidden states of every batch as they enter the block, and its calls."""
        return ((hidden, calls[self.step.index]) for hidden, calls in self.step.inputs.windows())

    def _remove_groups(self, choices: BlockRemoval) -> dict[str, list[ChannelGroup]]:
        """Choose groups, write zeros there and what makes up for them; the groups by matrix."""
        step, dense = self.step, self.method.dense_target
        need = {"square"}
        if self.method.reconstruct:
            need |= NEED | (OF_DENSE if dense and self.absorbing not in choices else set())
        for choice in choices.values():
            if choice.groups:
                need |= SELECTIONS[self.method.selections[choice.of]].need
        if "taylor" in need:  # which is no statistic of a forward
            need = need - {"taylor"} | {"gram"}
        observed = step.observe(need, PROBE_TOKENS, list(choices))
        added = None
        if self.absorbing in choices:
            targets = [b.target.to(step.device) for b in step.batches()] if dense else None
            span, name = self._span_blocks(), str(self.absorbing)
            windows, masks = step.inputs.windows(), step.inputs.masks()
            added = missing(step.block, span, name, windows, step.index, targets, masks)
        started = perf_counter()
        removed = {
            name: self._remove_from(
                name, choice, observed, added if name == self.absorbing else None
            )
            for name, choice in choices.items()
        }
        step.seconds.solve += perf_counter() - started
        return {name: groups for name, groups in removed.items() if choices[name].groups}

    def _remove_from(
        self, name: str, choice: Choice, observed: CalibrationStatistics, added: Missing | None
    ) -> list[ChannelGroup]:
        """Remove groups of one matrix, which also takes over what is `added` to its output."""
        step = self.step
        targets = weight_matrices(self.stored)
        weight = targets[name].weight.to(step.device, torch.float32, copy=True)
        named_bias = bias(self.stored, targets[name])
        old_bias = named_bias and named_bias[1].to(step.device, torch.float32, copy=True)
        stats = observed.stats.get(name)
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=step.device)
        groups: list[ChannelGroup] = []
        if choice.groups:
            groups = [choice.groups[i] for i in self._choose(name, choice, weight, stats)]
            kept[[i for group in groups for i in group.inputs]] = False
        new, new_bias = weight * kept, old_bias
        if self.method.reconstruct and stats is not None:
            product = added.product if added else None
            new, new_bias = reconstructed(weight, stats, kept, old_bias, product)
        put(f"{step.name}.{name}", new, (targets[name], step.matrices[name]))
        if new_bias is not None:
            self._put_bias(name, new_bias)
        change = _change(weight, old_bias, targets[name].weight, new_bias)
        if added and stats is not None:
            error = _error_left(change, weight, stats, added)
        else:
            error = _error_on(change, weight, observed.probes.get(name))
        note = self._note(weight, stats, absorbs=name == self.absorbing)
        self.reports.append(_report(f"{step.name}.{name}", choice, weight, error, note))
        return groups

    def _choose(self, name: str, choice: Choice, weight: Tensor, stats: Stats | None) -> list[int]:
        """The numbers of the groups that go."""
        inputs = choice.inputs.to(weight.device)
        selection = SELECTIONS[self.method.selections[choice.of]]
        if stats is None:
            return lowest(weight.square().sum(0)[inputs].sum(1), choice.removed).tolist()
        if "taylor" in selection.need and self.step.matrices[name].expert:
            # an expert's output is added: to first order they are the same
            selection = SELECTIONS["energy"]
        if "taylor" in selection.need:
            block = working_copy(self.step.block, self.step.device, torch.float32)
            masks = self.step.inputs.masks()
            score = taylor(block, name, inputs, self._batches(), masks).to(weight.device)
            stats = Stats(stats.tokens, {**stats.sums, "taylor": score})
        return selection.choose(weight, stats, inputs, choice.removed).tolist()

    def _put_bias(self, name: str, values: Tensor) -> None:
        """Write a bias `[out]` into both copies of the block, rounded as it is stored."""
        for block in (self.stored, self.step.block):  # the second gets what the first has rounded
            named = bias(block, weight_matrices(block)[name])
            assert named is not None
            values = named[1].copy_(values)

    def _note(self, weight: Tensor, stats: Stats | None, *, absorbs: bool) -> str:
        note = "" if stats is not None else "no calibration token: chosen by weights"
        zeros = count_zeros(weight) / weight.numel()
        if self.method.reconstruct and zeros > MANY_ZEROS:
            note += (
                f"{zeros:.0%} of it were zeros, which the repair has filled; leave out '+repair' "
                "to keep them"
            )
        if absorbs and self.span:
            blocks = "block" if len(self.span) == 1 else "blocks"
            note += f"{blocks} {', '.join(map(str, self.span))} folded into it"
        return note


def _change(
    weight: Tensor, old_bias: Tensor | None, new: Tensor, new_bias: Tensor | None
) -> Tensor:
    """What a matrix lost, `[out, in]` float32, and what its bias lost as one more column."""
    change = weight - new.to(weight.device, torch.float32)
    bias_change = torch.zeros(len(weight), device=weight.device)
    if old_bias is not None and new_bias is not None:
        bias_change = old_bias - new_bias
    return torch.cat([change, bias_change[:, None]], 1)


def _error_on(change: Tensor, weight: Tensor, probe: Tensor | None) -> float | None:
    """The output error of a change relative to the output, on inputs `[tokens, in]`."""
    if probe is None:
        return None
    ones = torch.ones_like(probe[:, :1])
    return output_error(torch.cat([probe, ones], 1), change, nn.functional.pad(weight, (0, 1)))


def _error_left(change: Tensor, weight: Tensor, stats: Stats, added: Missing) -> float:
    """The same where δ should be added: E‖change x + δ‖² relative to E‖W x‖², over all tokens."""
    gram, mean = stats.mean("gram"), stats.mean("sum")
    with_one = torch.cat([mean, torch.ones_like(mean[:1])])
    gram = torch.cat([torch.cat([gram, mean[None]]), with_one[:, None]], 1).to(change.device)
    # float32 overflows on spoilt weights
    change, weight, gram = change.double(), weight.double(), gram.double()
    left = ((change @ gram + 2 * added.product.to(change)) * change).sum().item() + added.power
    output = ((weight @ gram[:-1, :-1]) * weight).sum().clamp_min(1e-30).item()
    return max(left, 0.0) / output


def _report(
    name: str, choice: Choice, weight: Tensor, error: float | None, note: str
) -> MatrixReport:
    rows, inputs, pattern = *weight.shape, None
    if choice.groups:
        inputs = choice.left * len(choice.groups[0].inputs)
        pattern = f"{choice.left} of {choice.total} {NAMES[choice.of]} kept"
    return MatrixReport(name, (rows, inputs), pattern, 0.0, error, note)
