"""Plans that are measured: how much each block or site can lose, asked of the dense model before
anything is pruned.

`ALLOCATIONS` is the table of rules; `uniform` needs none. `owl` reads the norms of inputs; `error`
prunes every site at several sparsities and looks at what is left of its output; `search` moves
sparsity between blocks. Only percentages can be shared out: N:M removes the same everywhere. The
arithmetic is in allocation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from secateur.data.windows import Windows
from secateur.errors import BadPlan, OutputRefused, UnknownName
from secateur.methods import find_method
from secateur.methods.base import importance
from secateur.methods.patterns import Unstructured, parse_pattern
from secateur.models.context import check_windows
from secateur.models.matrices import matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import BlockRun, Step
from secateur.pruning.opening import opened
from secateur.pruning.planning.allocation import (
    Plan,
    by_outliers,
    is_file,
    least_error,
    names_left,
    read_plan,
    scaled,
    uniform,
    write_plan,
)
from secateur.pruning.planning.search import search
from secateur.pruning.planning.sensitivity import Measuring, levels_around, pruned_at, solvable
from secateur.system.devices import find_devices, find_dtype, forward_dtype
from secateur.system.files import disk_errors
from secateur.system.machine import typed_command
from secateur.system.progress import Progress
from secateur.system.settings import (
    CalibrationText,
    Compute,
    Destination,
    PlannedRecipe,
    Recipe,
    Trust,
)

OUTLIER, SPREAD = 5.0, 0.08
"""OWL's M, from how many times the mean a score is an outlier, and λ, how far a block may go from
the mean.
"""


def plan(
    model: str | Path | None = None,
    *,
    out: str | Path,
    allocate: str = PlannedRecipe.allocate,
    method: str = Recipe.method,
    pattern: str = Recipe.pattern,
    calibration: str | None = CalibrationText.calibration,
    samples: int = CalibrationText.samples,
    seq_len: int | None = CalibrationText.seq_len,
    seed: int = CalibrationText.seed,
    skip: Sequence[str] = Recipe.skip,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    data_dir: str | Path | None = CalibrationText.data_dir,
    overwrite: bool = Destination.overwrite,
    trust_remote_code: bool = Trust.trust_remote_code,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """How much to remove from which site of `model`, measured and written to the JSON file `out`.

    The file may be edited, and given to `prune` as `allocate`. Arguments as for `prune`. Raises
    SecateurError.
    """
    progress, out = progress or Progress(), Path(out)
    find_method(method)
    check_allocation(allocate, pattern, files=False)
    find_devices(device)
    find_dtype(dtype)
    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputRefused(
            f"{out} exists already. Choose another --out, or replace it with --overwrite."
        )
    text = CalibrationText(
        calibration=calibration, samples=samples, seq_len=seq_len, seed=seed, data_dir=data_dir
    )
    trust = Trust(trust_remote_code=trust_remote_code)
    _, language_model, windows = opened(model, text, Compute(), trust, out=out, progress=progress)
    found = make_plan(
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
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        made = {
            "model": str(model or "demo"),
            "allocation": allocate,
            "method": method,
            "pattern": pattern,
            "calibration": windows.fingerprint(),
            "command": typed_command(command),
        }
        write_plan(out, found, matrix_shapes(language_model), made)
    progress.end()
    return found


@torch.no_grad()
def make_plan(
    language_model: LanguageModel,
    windows: Windows,
    allocate: str,
    *,
    method: str,
    pattern: str,
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Plan:
    """The plan that `allocate` names: `uniform`, a key of `ALLOCATIONS`, or a JSON file.

    Raises UnknownName, BadPlan, BadPattern.
    """
    check_windows(language_model, windows, batch_size)
    shapes = matrix_shapes(language_model)
    if is_file(allocate):
        held = read_plan(Path(allocate), shapes)
        left = names_left(shapes, skip)
        return _not_empty({name: pattern for name, pattern in held.items() if name in left})
    check_allocation(allocate, pattern)
    wanted = parse_pattern(pattern)
    base = _not_empty(uniform(shapes, wanted, skip))
    if allocate == "uniform":
        return base
    assert isinstance(wanted, Unstructured), "check_allocation refuses others"
    progress, devices = progress or Progress(), find_devices(device)
    progress.begin(f"planning by {allocate}")
    forward = forward_dtype(find_dtype(dtype), devices[0])
    run = BlockRun(language_model, windows.ids, devices, forward, batch_size, progress=progress)
    measuring = Measuring(run, find_method(method), base, wanted)
    return scaled(base, ALLOCATIONS[allocate](measuring))


def _not_empty(plan: Plan) -> Plan:
    if not plan:
        raise BadPlan("Every site is left out; nothing would be pruned. Use fewer --skip.")
    return plan


def check_allocation(allocate: str, pattern: str, *, files: bool = True) -> None:
    """Raise UnknownName for a rule that does not exist, BadPlan for a pattern that cannot be shared
    out.

    `files`: a plan's file will do as well.
    """
    if files and is_file(allocate):
        if not Path(allocate).is_file():
            raise BadPlan(f"There is no plan {allocate}. Write one with 'secateur plan'.")
        return
    if allocate not in ("uniform", *ALLOCATIONS):
        known = ["uniform", *ALLOCATIONS, *(["a plan's .json file"] if files else [])]
        raise UnknownName("allocation", allocate, known)
    wanted = parse_pattern(pattern)
    if allocate in ALLOCATIONS and not isinstance(wanted, Unstructured):
        raise BadPlan(
            f"{wanted} removes the same of every site; --allocate {allocate} needs a percentage such as '70%'."
        )


def owl(measuring: Measuring) -> Mapping[str, float]:
    """The sparsity of each block by its share of outlying scores |w|·‖x‖ (Yin et al. 2024,
    arXiv:2310.05175).
    """
    shares: dict[str, float] = {}

    def look(step: Step) -> None:
        stats = step.observe({"square"}, 0).stats
        inside = [name for name in stats if f"{step.name}.{name}" in measuring.plan]
        scores = [
            importance(step.sites[name].weight.float(), stats[name]).flatten() for name in inside
        ]
        if scores:
            whole = torch.cat(scores)
            shares[step.name] = (whole > OUTLIER * whole.mean()).float().mean().item()

    measuring.each("outliers of", look)
    sizes = measuring.blocks
    unseen = dict.fromkeys(
        sizes.keys() - shares.keys(), measuring.sparsity
    )  # blocks without tokens
    return (
        by_outliers(shares, {name: sizes[name] for name in shares}, measuring.sparsity, SPREAD)
        | unseen
    )


def by_error(measuring: Measuring) -> Mapping[str, float]:
    """The sparsity of each site that makes the sum of relative output errors least, by the method's
    own errors.
    """
    curves: dict[str, list[tuple[float, float]]] = {}

    def look(step: Step) -> None:
        for names, weights, stats in solvable(step, measuring):
            for level in levels_around(measuring.sparsity):
                for name, error, _ in pruned_at(
                    measuring.at(level), names, weights, stats, measuring.method
                ):
                    curves.setdefault(f"{step.name}.{name}", []).append((level, error))

    measuring.each("errors of", look)
    shapes = matrix_shapes(measuring.run.language_model)
    sizes = {name: prod(shapes[name]) for name in curves}
    unseen = dict.fromkeys(
        measuring.plan.keys() - curves.keys(), measuring.sparsity
    )  # sites without tokens
    return least_error(curves, sizes, measuring.sparsity) | unseen


ALLOCATIONS: dict[str, Callable[[Measuring], Mapping[str, float]]] = {
    "owl": owl,
    "error": by_error,
    "search": search,
}
