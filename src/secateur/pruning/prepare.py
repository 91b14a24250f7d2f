"""What is settled before the first block of a run: whether it can be done, the plan, and the way
through the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.checkpoints.record import Report, Seconds
from secateur.data.windows import Windows
from secateur.errors import UnsupportedModel
from secateur.methods import Method, find_method
from secateur.methods.patterns import kind_of, parse, parse_pattern
from secateur.models.load import check_windows
from secateur.models.matrices import coverage, matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.pruning.planning.allocation import Plan, is_file, label
from secateur.pruning.planning.measured import make_plan
from secateur.pruning.planning.memory import UNKNOWN_COST, way_through
from secateur.system.devices import calibration_dtype, find_devices, find_dtype
from secateur.system.machine import release_memory
from secateur.system.progress import Progress
from secateur.system.settings import Compute

MINIMUM_COVERAGE = 0.95


@dataclass
class Pruning:
    """A run as it has been decided: what `prune.pruned_blocks` needs to know.

    `passes`: with "one" a block runs once, and every site sees what the pruned sites before it
    give. With "two" it runs once for the statistics of all sites and once for what enters the next
    block; a `sequential` method then costs a forward for each group of sites that share an input. A
    method that refines runs the finished block once more; one that reads "cross" or refines costs a
    second stream, through the dense model. `finished`: what the first blocks have become already;
    they are gone through and not given again. `ranks` share the work.
    """

    method: Method
    plan: Plan
    devices: Sequence[torch.device]
    dtype: torch.dtype | None
    batch_size: int
    progress: Progress = field(default_factory=Progress)
    seconds: Seconds = field(default_factory=Seconds)
    passes: str = "one"
    spill: Path | None = None
    finished: Sequence[nn.Module] = ()
    ranks: Ranks = ALONE

    def decisions(self) -> dict[str, Any]:
        """What a run that goes on must take over rather than decide again, as JSON can hold it."""
        return {
            "passes": self.passes,
            "spill": self.spill is not None,
            "batch_size": self.batch_size,
            "plan": {name: str(part) for name, part in self.plan.items()},
        }


def decide(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str,
    pattern: str,
    allocate: str,
    skip: Sequence[str],
    device: str,
    dtype: str,
    batch_size: int,
    passes: str,
    memory: str | int | None,
    allow_low_coverage: bool,
    progress: Progress,
    spill: Path,
    decided: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Report, Pruning]:
    """The plan and everything else of a run that is about to start, and its report, still empty.

    `spill` is the folder for what does not fit into memory. `decided`: what `Pruning.decisions` of
    a run that goes on were. Raises UnsupportedModel for too low a coverage, or for what several
    ranks cannot share.
    """
    check_windows(language_model, windows, batch_size)
    counts = [coverage(block) for block in language_model.blocks]
    share = sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)
    if share < MINIMUM_COVERAGE and not allow_low_coverage:
        raise UnsupportedModel(
            f"Only {share:.1%} of the block weights of {type(language_model.model).__name__} are prunable matrices; "
            f"{MINIMUM_COVERAGE:.0%} are wanted, since {parse(pattern)} of those would be less of the model than it "
            "says. Allow it with --allow-low-coverage."
        )
    started = perf_counter()
    found, devices = find_method(method), find_devices(device)
    if ranks.size > 1 and (found.refine or found.permute):
        raise UnsupportedModel(
            f"{method} looks at whole blocks with all windows, which several processes do not share; found "
            f"{ranks.size}. Run it in one, or leave +refine and +permute out."
        )
    forward = ranks.same(
        lambda: calibration_dtype(find_dtype(dtype), devices[0], language_model.model.dtype)
    )

    def made() -> dict[str, Any]:
        plan = make_plan(
            language_model,
            windows,
            allocate,
            method=method,
            pattern=pattern,
            skip=skip,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            progress=progress,
        )
        compute = Compute(passes=passes, memory=memory, batch_size=batch_size)
        shared = devices * ranks.size
        shape = windows.ids.shape
        way = way_through(language_model, shape, found, plan, compute, forward, shared)
        return {**way, "plan": {name: str(part) for name, part in plan.items()}}

    decided = decided or ranks.same(made)
    plan = {name: parse_pattern(part) for name, part in decided["plan"].items()}
    seconds = Seconds(plan=perf_counter() - started)
    release_memory()
    shown = label(plan, matrix_shapes(language_model)) if is_file(allocate) else str(parse(pattern))
    progress.begin(f"pruning with {method} to {shown}")
    report = Report(
        method,
        shown,
        kind_of(plan.values()),
        0.0,
        share,
        [],
        seconds,
        None,
        windows.fingerprint(),
        allocate,
    )
    report.note = UNKNOWN_COST.format(method) if found.cost is None else ""
    return report, Pruning(
        found,
        plan,
        devices,
        forward,
        decided["batch_size"],
        progress,
        seconds,
        decided["passes"],
        spill if decided["spill"] else None,
        ranks=ranks,
    )
