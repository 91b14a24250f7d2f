"""`+refine`: the kept weights of a block, tuned together so that it does what the dense one does.

A solver sees one matrix; here attention, gates and products of the whole block take
part. Masks stand still, Adam moves what is kept, and the loss is the error of the block's output on
the calibration tokens: inputs as the pruned prefix gives them, targets what the dense block gives
on dense inputs, so that errors of earlier blocks are made up for as well (EBFT, Guo et al. 2024,
arXiv:2402.12419). Gradients end at the block's border, so one block is in memory, with four numbers
more for each of its weights.

Departures: each token's error is taken relative to the power of its target, since the norm that
reads it divides by that; the rate is relative to the size of a parameter's weights and falls to
zero. Windows that are not tuned on judge, and a block that did not come nearer there keeps its
weights.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite, nan
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import NonFinite
from secateur.methods.base import Method
from secateur.methods.values import Values
from secateur.models.kept import keep_masks, kept_of
from secateur.models.matrices import weight_matrices
from secateur.models.replay import run_block, working_copy
from secateur.models.stream.blocks import Step
from secateur.models.stream.forward import Batch
from secateur.models.stream.steps import judging_batches
from secateur.models.stream.straight_through import (
    StraightThrough,
    grids_of,
    put_on_grid,
    take_off_grid,
)

RATE = 0.4
"""Adam's first step as a share of a parameter's root mean square weight, times √inputs.

So a step that all inputs agree on changes the output by the same share in layers of any width (Yang
et al. 2022, arXiv:2203.03466, table 3). On the demo model 0.14, 0.4 and 1.4 were tried.
"""
RATE_ON_GRID = 0.5
"""Of that, where weights stay on a grid and jump from level to level: 0.25 to 3 were tried on the
demo model.
"""
MOST_EPOCHS = 5
"""Few windows come several times until there were enough steps, but so often at most."""


def steps_on(most: int, batches: int) -> int:
    """In how many steps, at `most`, a block is tuned on so many batches."""
    return min(most, MOST_EPOCHS * batches)


def shared_out(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """The batches to tune a block on and those that judge it; those that count."""
    batches = [batch for batch in batches if _weight(batch)]
    first = len(batches) - judging_batches([_windows(batch) for batch in batches])
    return batches[:first], batches[first:] or batches


class Tuned(NamedTuple):
    """A block's relative output error where it is judged, before and after; the same where tuning
    did not help, NaN where there is none.
    """

    before: float
    after: float

    @property
    def better(self) -> bool:
        return self.after < self.before

    def refuse_non_finite(self, block: str) -> None:
        """Raise NonFinite where the block, or the dense one, makes no numbers of the text."""
        if not isfinite(self.before):
            raise NonFinite(
                f"{block} makes NaN or Inf of the text, or the dense block does. Nothing can aim "
                "at that. Check the model with 'secateur inspect', or use --dtype float32."
            )


def refine(
    block: nn.Module,
    kept: Mapping[str, Tensor],
    seen: Sequence[Batch],
    judged: Sequence[Batch],
    steps: int,
    rate: float = RATE,
    grids: Mapping[str, StraightThrough] | None = None,
) -> Tuned:
    """Tune the parameters named in `kept` (bool, of their shape) in place, in float32.

    Each of the `steps` sees one of the batches `seen`, which come in a fixed shuffled order, all of
    them before any comes again; the batches `judged` say whether that helped. What `kept` leaves
    out stays 0, and parameters with one of `grids` stay on it.
    """
    tuned = {name: block.get_parameter(name) for name in kept}
    inputs = {one.parameter: one.weight.shape[1] for one in weight_matrices(block).values()}
    start = {name: parameter.detach().clone() for name, parameter in tuned.items()}
    before = error(block, judged)
    block.requires_grad_(False)
    grids = grids or {}
    put_on_grid(block, grids)
    groups = []
    for name, parameter in tuned.items():
        parameter.requires_grad_(True)
        size = parameter.detach().square().sum().div(kept[name].sum().clamp_min(1)).sqrt().item()
        step = rate * (RATE_ON_GRID if name in grids else 1.0)
        groups.append({"params": [parameter], "lr": step * size / inputs[name] ** 0.5})
    optimiser = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / max(steps, 1))
    hidden = seen[0].hidden
    # Adam does not see the scale; gradients in float16 would be zero without it.
    scale = float(hidden.shape[-1] * (hidden.numel() // hidden.shape[-1]) ** 0.5)
    with torch.enable_grad():
        for number in islice(_order(len(seen)), steps):
            optimiser.zero_grad()
            (scale * _loss(block, seen[number])).backward()
            for name, parameter in tuned.items():
                if parameter.grad is not None:
                    parameter.grad.mul_(kept[name])
            optimiser.step()
            schedule.step()
    for parameter in block.parameters():
        parameter.requires_grad_(False).grad = None
    take_off_grid(block, grids)
    after = error(block, judged)
    if after < before:
        return Tuned(before, after)
    for name in tuned:
        block.get_parameter(name).copy_(start[name])
    if not isfinite(after) and not isfinite(error(block, seen)):
        return Tuned(nan, nan)
    return Tuned(before, before)


def _order(count: int) -> Iterator[int]:
    """Which batch a step sees, on and on."""
    draw = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=draw).tolist()


@torch.no_grad()
def error(block: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean over tokens of ‖output − target‖² / ‖target‖²."""
    counts = [_weight(batch) for batch in batches]
    lost = (_loss(block, one).item() * n for one, n in zip(batches, counts, strict=True) if n)
    return sum(lost) / sum(counts)


def _weight(batch: Batch) -> int:
    """How much a batch counts: its windows, or where not all tokens count those that do."""
    if batch.counted is None:
        return batch.hidden.shape[-3]  # Gemma 3n: [streams, …]
    return int(batch.counted.sum())


def _windows(batch: Batch) -> int:
    """How many windows of a batch have a token that counts and is foreseen, as for `+distil`."""
    if batch.counted is None:
        return batch.hidden.shape[-3]
    return int(batch.counted[:, 1:].any(1).sum())


def _loss(block: nn.Module, batch: Batch) -> Tensor:
    device = next(block.parameters()).device
    hidden, target = batch.hidden.to(device), batch.target.to(device).float()
    with torch.autocast(device.type, hidden.dtype, enabled=hidden.dtype != torch.float32):
        output = run_block(block, hidden, batch.call)
    power = target.square().sum(-1).clamp_min(1e-30)
    errors = (output.float() - target).square().sum(-1) / power  # […, windows, length]
    return (errors if batch.counted is None else errors[..., batch.counted.to(device)]).mean()


def refine_block(
    step: Step,
    result: nn.Module,
    changed: Sequence[str],
    pruned: Container[str],
    method: Method,
    values: Values | None = None,
) -> Tuned:
    """Tune the `changed` parameters of a pruned block as the `method` says, and round them into
    both copies. Raises NonFinite.

    Experts that were not `pruned` stay as they are; what is on the grid of `values` stays on it.
    """
    seen, judged = shared_out(step.batches())
    with step.seconds.counted("refine"):
        block = working_copy(step.block, step.device, torch.float32)
        for name in changed:
            block.get_parameter(name).data.copy_(result.get_parameter(name).data)
        kept = kept_of(block, changed, pruned)
        grids = grids_of(result, kept, values) if values else {}
        steps = steps_on(method.refine, len(seen))
        tuned = refine(block, kept, seen, judged, steps, grids=grids)
        tuned.refuse_non_finite(step.name)
        keep_masks(block, result, kept, grids)
        for name in changed:
            stored = result.get_parameter(name).data.copy_(block.get_parameter(name).data)
            step.block.get_parameter(name).data.copy_(stored)
    return tuned
