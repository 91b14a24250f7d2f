"""`prune` for a model in memory: the same loop over the blocks, and nothing on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from secateur.checkpoints.record import Report
from secateur.data.windows import Windows
from secateur.methods import find_method
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.values import parse_values
from secateur.models.replay import LanguageModel
from secateur.models.stream.distil import aims
from secateur.pruning.check import find_zeros
from secateur.pruning.distil import as_it_is_run, distil_model, refusal, spill_of
from secateur.pruning.prepare import block_run, prepare
from secateur.pruning.prune import pruned_blocks
from secateur.system.devices import find_resources
from secateur.system.memory import PeakMemory
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Recipe, Trust, taken


def prune_model(
    language_model: LanguageModel,
    windows: Windows,
    *,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    allocate: str = Recipe.allocate,
    values: str = Recipe.values,
    skip: Sequence[str] = Recipe.skip,
    keep_zeros: bool = Recipe.keep_zeros,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    passes: str = Compute.passes,
    memory: str | int | None = Compute.memory,
    allow_low_coverage: bool = Trust.allow_low_coverage,
    progress: Progress | None = None,
) -> Report:
    """Prune a model in memory, in place; arguments as for `prune`. Nothing is written to disk.

    Raises BadPattern for a structure, which leaves another model: use `prune`.
    """
    given = locals()
    recipe, trust = taken(Recipe, given), taken(Trust, given)
    resources = find_resources(taken(Compute, given))
    kind = parse_values(values)
    zeros = find_zeros(recipe, find_method(method), parse_pattern(pattern), kind)
    spill = Path(gettempdir())
    with PeakMemory() as peak:
        run = block_run(language_model, windows, resources, spill, progress or Progress())
        refused = refusal(run, zeros.method, resources.limit, spill / "distil", states=0)
        run_as, without = as_it_is_run(zeros.method, refused, _decided)
        zeros = zeros._replace(method=run_as)
        report, pruning = prepare(run, windows, zeros, resources, trust, _decided)
        report.remark(without)
        tokens = pruning.method.distil
        large = spill_of(run, spill, resources.limit) if tokens else None
        found = aims(run, tokens, large) if tokens else None
        for block in pruned_blocks(pruning):
            for name, tensor in block.tensors.items():
                language_model.model.get_parameter(name).data.copy_(tensor)
            report.take(block.entry(language_model.block_name(block.index)))
        if found:
            distil_model(pruning, found, report, resources.limit, large)
    report.end(peak.bytes)
    return report


def _decided(_: str, decide: Callable[[], Any]) -> Any:
    """What is decided in a run that nobody goes on with."""
    return decide()
