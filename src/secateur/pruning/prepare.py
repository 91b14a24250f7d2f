"""What is settled before the first block of a run: whether it can be done, the plan, and the way
through the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from secateur.checkpoints.record import Report
from secateur.data.windows import Windows
from secateur.errors import UnsupportedModel
from secateur.methods import Method
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import kind_of
from secateur.methods.values import AS_STORED, Values
from secateur.models.context import check_windows
from secateur.models.matrices import matrix_shapes, model_coverage
from secateur.models.parts import parts_in_words
from secateur.models.replay import LanguageModel
from secateur.models.source import ignored_in_words
from secateur.models.stream.blocks import BlockRun
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.pruning.check import Zeros
from secateur.pruning.planning.allocation import Plan, is_file, label, left_dense_in_words
from secateur.pruning.planning.measured import make_plan
from secateur.pruning.planning.memory import UNKNOWN_COST, way_through
from secateur.system.devices import Resources, calibration_dtype
from secateur.system.files import file_sha256
from secateur.system.machine import versions
from secateur.system.memory import release_memory
from secateur.system.progress import Progress
from secateur.system.settings import Trust

MINIMUM_COVERAGE = 0.95


@dataclass(frozen=True)
class Pruning:
    """A run as it has been decided: by which method, how much of what, and how blocks are run.

    With "one" of `passes` a block runs once, and every weight matrix sees what the pruned ones
    before it give. With "two" it runs once for the statistics of all matrices and once for what
    enters the next block; a `sequential` method then costs a forward for each group of matrices
    that share an input. A method that refines runs the finished block once more; one that reads
    "cross" or refines costs a second stream, through the dense model.
    """

    run: BlockRun
    method: Method
    plan: Plan
    passes: str = "one"
    keep_zeros: bool = False
    values: Values | None = None


def block_run(
    language_model: LanguageModel,
    windows: Windows,
    resources: Resources,
    spill: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> BlockRun:
    """The calibration windows on their way through the blocks, on the devices and in the dtype that
    `resources` name; `spill` is the folder for what does not fit into memory.
    """
    first, stored = resources.devices[0], language_model.model.dtype
    return BlockRun(
        language_model,
        windows.ids,
        resources.devices,
        ranks.same(lambda: calibration_dtype(resources.dtype, first, stored)),
        resources.batch_size,
        spill,
        ranks,
        progress=progress,
        counted=windows.counted,
        bos=windows.bos == "each-window",
    )


def conditions_of(
    run: BlockRun, windows: Windows, zeros: Zeros, resources: Resources
) -> dict[str, Any]:
    """What must be the same for a run that died to be gone on with, as JSON can hold it."""
    recipe = zeros.recipe
    forward = run.dtype or run.language_model.model.dtype
    return {
        "method": recipe.method,
        "pattern": str(zeros.pattern),
        "allocate": recipe.allocate,
        "passes": resources.passes,
        "dtype": str(forward).removeprefix("torch."),
        "batch_size": resources.batch_size,
        "skip": list(recipe.skip),
        "plan": file_sha256(Path(recipe.allocate)) if is_file(recipe.allocate) else None,
        "calibration": windows.fingerprint(),
        "device": run.devices[0].type,
        "versions": versions(),
        **({"keep_zeros": True} if recipe.keep_zeros else {}),
        **({"values": str(zeros.values)} if zeros.values else {}),
    }


def prepare(
    run: BlockRun,
    windows: Windows,
    zeros: Zeros,
    resources: Resources,
    trust: Trust,
    once: Callable[[str, Callable[[], Any]], Any],
) -> tuple[Report, Pruning]:
    """Decide how a run goes; returns its report, still empty, and the run.

    `once(what, decide)` gives what `decide` gives, or what it gave to a run that is gone on with.
    Raises UnsupportedModel for too low a coverage, or for what several ranks cannot share.
    """
    recipe, method, pattern, values = zeros
    check_windows(run.language_model, windows, run.batch_size)
    run = run.by_steps() if method.refine else run
    share = _checked_coverage(run.language_model, zeros, trust)
    if run.ranks.size > 1 and (method.refine or method.permute or method.distil):
        raise UnsupportedModel(
            f"{recipe.method} looks at whole blocks with all windows, which several processes do "
            f"not share; found {run.ranks.size}. Run it in one, or leave +refine, +permute and "
            "+distil out."
        )
    started = perf_counter()
    decided = once("decided", lambda: _decide(run, windows, zeros, resources))
    run.seconds.plan = perf_counter() - started
    release_memory()
    plan = {name: parse_pattern(part) for name, part in decided["plan"].items()}
    shapes = matrix_shapes(run.language_model)
    zeros.check_groups(plan, shapes)
    shown = label(plan, shapes) if is_file(recipe.allocate) else str(pattern)
    rounded = f" and {values}" if values else ""
    run.progress.begin(f"pruning with {recipe.method} to {shown}{rounded}")
    cost = UNKNOWN_COST.format(recipe.method) if method.cost is None else ""
    dense = left_dense_in_words(plan, shapes) if is_file(recipe.allocate) else ""
    left = dense, parts_in_words(run.language_model.model), ignored_in_words(run.language_model)
    report = Report(
        recipe.method,
        shown,
        kind_of(plan.values()),
        0.0,
        share,
        [],
        run.seconds,
        None,
        windows.fingerprint(),
        recipe.allocate,
        note=" ".join(filter(None, (cost, *left, windows.empty_in_words()))),
        values=str(values or AS_STORED),
    )
    spill = run.spill if decided["spill"] else None
    run = replace(run, batch_size=decided["batch_size"], spill=spill)
    return report, Pruning(run, method, plan, decided["passes"], recipe.keep_zeros, values)


def _checked_coverage(language_model: LanguageModel, zeros: Zeros, trust: Trust) -> float:
    """The share of the block weights that are prunable matrices. Raises UnsupportedModel where it
    is too low.
    """
    share = model_coverage(language_model)
    if share < MINIMUM_COVERAGE and not trust.allow_low_coverage:
        raise UnsupportedModel(
            f"Only {share:.1%} of the block weights of {type(language_model.model).__name__} are "
            f"prunable matrices; {MINIMUM_COVERAGE:.0%} are wanted, since {zeros.pattern} of those "
            "would be less of the model than it says. Allow it with --allow-low-coverage."
        )
    return share


def _decide(run: BlockRun, windows: Windows, zeros: Zeros, resources: Resources) -> dict[str, Any]:
    """The plan and the way through the blocks, as JSON can hold it: what a run that goes on takes
    over rather than decide again.
    """
    recipe = zeros.recipe
    plan = make_plan(run.language_model, windows, recipe, resources, run.progress)
    way = way_through(run, zeros.method, plan, resources.passes, resources.limit)
    return {**way, "plan": {name: str(part) for name, part in plan.items()}}
