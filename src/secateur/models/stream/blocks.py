"""The blocks in order, each with its calibration inputs: data only moves forward.

`stream` records what enters block 0, then yields one `Step` per block. While a step is open its
user reads statistics of the block's inputs and writes new weights into the working copy; asking for
the next step runs the changed block, so the inputs of block i+1 come from the pruned block i, and
overwrites the hidden states. With `Step.stages` that is one forward, which stops wherever sites are
to be pruned and goes on through them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.checkpoints.record import Seconds
from secateur.errors import NonFinite
from secateur.models.matrices import WeightMatrix, weight_matrices
from secateur.models.replay import Call, LanguageModel, Shell
from secateur.models.stream.forward import Batch, BlockRun, ForwardPass
from secateur.models.stream.observe import CalibrationStatistics, observe, suspended
from secateur.system.tensors import is_finite

PROBE_TOKENS = 256
"""On how many calibration tokens, about, the output error of every site is measured."""


@dataclass
class Step:
    """One block with its calibration inputs. `block` is a working copy; `sites` are views of its
    weights.
    """

    index: int
    name: str
    block: nn.Module
    sites: dict[str, WeightMatrix]
    seconds: Seconds
    last: bool
    _flow: ForwardPass = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the working copy lies."""
        return next(self.block.parameters()).device

    def observe(
        self, need: Iterable[str], probe: int, only: Collection[str] | None = None
    ) -> CalibrationStatistics:
        """One forward of the block as it is now, in which the inputs of its sites are seen, or
        those in `only`.

        The probe takes evenly spaced tokens of the first batch, about `probe` of them. Raises
        NonFinite.
        """
        return observe(self._flow, self.index, need, probe, only)

    def stages(
        self,
        need: Iterable[str],
        probe: int,
        only: Collection[str],
        *,
        one_pass: bool,
        sequential: bool,
        again: bool,
    ) -> Iterator[tuple[list[str], CalibrationStatistics]]:
        """The sites in `only`, some at a time, with what is seen of their inputs; before the next,
        they are pruned.

        In one pass, those that share an input come together, in the order in which a forward
        reaches them, and it goes on through what was pruned; to the end of the block, unless the
        block will be run `again`. In two, all come at once, and inputs are those of the dense
        block; or, if `sequential`, in stages with a forward for each.
        """
        if one_pass and (stages := self._flow.stages(self.index)).plain:
            if unreached := [name for name in stages.unreached if name in only]:
                yield unreached, CalibrationStatistics({}, {}, {})  # before any forward starts
            wanted = [
                kept for stage in stages.order if (kept := [name for name in stage if name in only])
            ]
            yield from suspended(
                self._flow, self.index, wanted, need, probe, finish=not again and not self.last
            )
            return
        for group in self.groups() if sequential else [list(self.sites)]:
            if kept := [name for name in group if name in only]:
                yield kept, self.observe(need, probe, kept)

    def first(self) -> tuple[Tensor, Call]:
        """The hidden states of the first batch as they enter the block, and its call."""
        return self._flow.hidden[0].to(self.device), self._flow.calls[0][self.index]

    def windows(self) -> list[tuple[Tensor, list[Call]]]:
        """The hidden states of every batch as they enter the block, and the calls of all blocks of
        the model.
        """
        return [
            (h.to(self.device), calls)
            for h, calls in zip(self._flow.hidden, self._flow.calls, strict=True)
        ]

    def replace(self, block: nn.Module) -> None:
        """Go on with this block instead of the working copy, which is dropped; it may have other
        shapes.
        """
        self._flow.replace(block)

    @torch.no_grad()
    def batches(self) -> list[Batch]:
        """The inputs of the block, and what the dense block gives on the dense inputs; `stream`
        with `dense` only.
        """
        return self._flow.batches(self.index)

    def groups(self) -> list[list[str]]:
        """The sites in the order in which the block reaches them, those that share an input
        together.

        Sites that the first batch does not reach come last.
        """
        stages = self._flow.stages(self.index)
        return [*stages.order, *([stages.unreached] if stages.unreached else [])]


def stream(
    run: BlockRun,
    *,
    dense: bool = False,
    kept: Collection[int] | None = None,
    finished: Sequence[nn.Module] = (),
) -> Iterator[Step]:
    """The blocks in order with the inputs that the tokens of the run give them; those in `kept`, or
    all.

    With `dense`, a second stream goes through the dense blocks, for the statistic "cross" and for
    `Step.batches`. The first blocks may be `finished`: these stand in for them, and no step is
    given.
    """
    # Not under no_grad as a whole: torch's wrapper of a generator would hold on to the step before.
    flow = ForwardPass(run, dense=dense)
    order = list(range(len(run.language_model.blocks))) if kept is None else sorted(kept)
    for index in range(order[-1] + 1):
        if index not in order:
            flow.skip(index)
            continue
        position = order.index(index)
        if position < len(finished):
            flow.open(index, finished[position])
        else:
            flow.open(index)
            step = _step(flow, index, last=index == order[-1])
            yield step
            del step  # its copy of the block would live beside the next one
        if index < order[-1]:
            flow.advance(index)


def _step(flow: ForwardPass, index: int, *, last: bool) -> Step:
    block = flow.replicas[0]
    return Step(
        index,
        flow.language_model.block_name(index),
        block,
        weight_matrices(block),
        flow.seconds,
        last,
        flow,
    )


@torch.no_grad()
def final_hidden(
    language_model: LanguageModel,
    shell: Shell,
    tokens: Tensor,
    dtype: torch.dtype | None,
    batch_size: int,
) -> Tensor:
    """What the last block returns for tokens `[samples, length]`: `[…, samples, length, hidden]`,
    on the CPU.

    Most families have nothing before the samples; Gemma 3n has several streams there.
    """
    run = BlockRun(language_model, tokens, [shell.device], dtype, batch_size)
    flow = ForwardPass(run, shell=shell)
    for index in range(len(language_model.blocks)):
        flow.open(index)
        flow.advance(index)
    return torch.cat([hidden.cpu() for hidden in flow.hidden], dim=-3)


def put(step: Step, name: str, weight: Tensor, targets: Mapping[str, WeightMatrix]) -> None:
    """Write a new weight `[out, in]` into both copies of the block, rounded as it is stored. Raises
    NonFinite.
    """
    stored = weight.to(targets[name].stored.dtype)
    if not is_finite(stored):
        raise NonFinite(
            f"The pruned weights of {step.name}.{name} do not fit {stored.dtype}. Use another method, or --skip it."
        )
    targets[name].put(stored)
    step.sites[name].put(stored)


def refuse_non_finite_weights(step: Step, original: Mapping[str, WeightMatrix]) -> None:
    """Raise NonFinite for NaN or Inf in the stored weights of a block."""
    for name, site in original.items():
        if not is_finite(site.stored):
            raise NonFinite(
                f"The weights of {step.name}.{name} hold NaN or Inf. Fetch the checkpoint again."
            )
