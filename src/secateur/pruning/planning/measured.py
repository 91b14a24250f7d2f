"""Plans that are measured: how much each block or weight matrix can lose, asked of the dense model
before anything is pruned.

`ALLOCATIONS` is the table of rules; `uniform` needs none. `owl` reads the norms of inputs; `error`
prunes every matrix at several sparsities and looks at what is left of its output; `search` moves
sparsity between blocks. Only percentages can be shared out: N:M removes the same everywhere. The
arithmetic is in allocation.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from secateur.data.bos import readable
from secateur.data.windows import Windows
from secateur.errors import BadPlan, OutputRefused, UnknownName
from secateur.methods import find_method
from secateur.methods.base import importance
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import Unstructured
from secateur.models.context import check_windows
from secateur.models.matrices import matrix_shapes
from secateur.models.replay import LanguageModel
from secateur.models.stream.blocks import BlockRun, Step
from secateur.pruning.opening import opened
from secateur.pruning.own_text import own_file
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
from secateur.pruning.planning.sensitivity import Sensitivity, levels_around
from secateur.system.devices import Resources, find_resources, forward_dtype
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
    taken,
)

OUTLIER, SPREAD = 5.0, 0.08
"""OWL's M, how many times the mean an outlier is, and λ, how far a block may go from the mean."""


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
    bos: str = CalibrationText.bos,
    calibration_on: str = CalibrationText.calibration_on,
    self_temperature: float = CalibrationText.self_temperature,
    self_tokens: int = CalibrationText.self_tokens,
    overwrite: bool = Destination.overwrite,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Measure how much each weight matrix of `model` can lose, and write it to the JSON file `out`.

    The file may be edited, and given to `prune` as `allocate`. Arguments as for `prune`. Raises
    SecateurError.
    """
    recipe, text = taken(Recipe, locals()), readable(taken(CalibrationText, locals()))
    resources, trust = find_resources(taken(Compute, locals())), taken(Trust, locals())
    file, progress = Path(out), progress or Progress()
    find_method(method)
    check_allocation(allocate, pattern, files=False)
    if file.is_dir() or (file.exists() and not overwrite):
        raise OutputRefused(
            f"{file} exists already. Choose another --out, or replace it with --overwrite."
        )
    destination = Destination(out=file)
    _, language_model, windows = opened(
        model, text, resources, trust, destination=destination, progress=progress
    )
    plan = make_plan(language_model, windows, recipe, resources, progress)
    made = {
        "model": str(model or "demo"),
        "allocation": allocate,
        "method": method,
        "pattern": pattern,
        "calibration": windows.fingerprint(),
        "command": typed_command(command),
    }
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_plan(file, plan, matrix_shapes(language_model), made)
    own_file(file).unlink(missing_ok=True)
    progress.end()
    return plan


@torch.no_grad()
def make_plan(
    language_model: LanguageModel,
    windows: Windows,
    recipe: Recipe,
    resources: Resources,
    progress: Progress,
) -> Plan:
    """The plan that `recipe.allocate` names: `uniform`, a key of `ALLOCATIONS`, or a JSON file.

    The model is not changed. Raises UnknownName, BadPlan, BadPattern.
    """
    check_windows(language_model, windows, resources.batch_size)
    shapes, allocate = matrix_shapes(language_model), recipe.allocate
    if is_file(allocate):
        plan, left = read_plan(Path(allocate), shapes), names_left(shapes, recipe.skip)
        return _not_empty({name: pattern for name, pattern in plan.items() if name in left})
    check_allocation(allocate, recipe.pattern)
    pattern = parse_pattern(recipe.pattern)
    plan = _not_empty(uniform(shapes, pattern, recipe.skip))
    if allocate == "uniform":
        return plan
    assert isinstance(pattern, Unstructured), "check_allocation refuses others"
    progress.begin(f"planning by {allocate}")
    devices, batch_size = resources.devices, resources.batch_size
    dtype = forward_dtype(resources.dtype, devices[0])
    run = BlockRun(
        language_model,
        windows.ids,
        devices,
        dtype,
        batch_size,
        progress=progress,
        counted=windows.counted,
    )
    sensitivity = Sensitivity(run, find_method(recipe.method), plan, pattern)
    return scaled(plan, ALLOCATIONS[allocate](sensitivity))


def _not_empty(plan: Plan) -> Plan:
    if not plan:
        raise BadPlan("Every weight matrix is left out; nothing would be pruned. Use fewer --skip.")
    return plan


def check_allocation(allocate: str, pattern: str, *, files: bool = True) -> None:
    """Raise UnknownName for an unknown rule, BadPlan for a pattern that cannot be shared out.

    `files`: a plan's file will do as well.
    """
    if files and is_file(allocate):
        if not Path(allocate).is_file():
            raise BadPlan(f"There is no plan {allocate}. Write one with 'secateur plan'.")
        return
    if allocate not in ("uniform", *ALLOCATIONS):
        known = ["uniform", *ALLOCATIONS, *(["a plan's .json file"] if files else [])]
        raise UnknownName("allocation", allocate, known)
    parsed = parse_pattern(pattern)
    if allocate in ALLOCATIONS and not isinstance(parsed, Unstructured):
        raise BadPlan(
            f"{parsed} removes the same of every weight matrix; --allocate {allocate} needs a "
            "percentage such as '70%'."
        )


def owl(sensitivity: Sensitivity) -> Mapping[str, float]:
    """The sparsity of each block by its share of outliers among |w|·‖x‖ (OWL, arXiv:2310.05175)."""
    shares: dict[str, float] = {}

    def look(step: Step) -> None:
        stats = step.observe({"square"}, 0).stats
        scores = [
            importance(step.matrices[name].weight.float(), stats[name]).flatten()
            for name in stats
            if f"{step.name}.{name}" in sensitivity.plan
        ]
        if scores:
            whole = torch.cat(scores)
            shares[step.name] = (whole > OUTLIER * whole.mean()).float().mean().item()

    sensitivity.each("outliers of", look)
    sizes, sparsity = sensitivity.blocks, sensitivity.sparsity
    unseen = dict.fromkeys(sizes.keys() - shares.keys(), sparsity)  # blocks without tokens
    return by_outliers(shares, {name: sizes[name] for name in shares}, sparsity, SPREAD) | unseen


def by_error(sensitivity: Sensitivity) -> Mapping[str, float]:
    """The sparsity of each matrix that makes the sum of the method's relative errors least."""
    curves: dict[str, list[tuple[float, float]]] = {}

    def look(step: Step) -> None:
        for group in sensitivity.groups(step):
            for level in levels_around(sensitivity.sparsity):
                for name, error, _ in sensitivity.pruned(group, level):
                    curves.setdefault(f"{step.name}.{name}", []).append((level, error))

    sensitivity.each("errors of", look)
    sizes, sparsity = sensitivity.sizes, sensitivity.sparsity
    unseen = dict.fromkeys(sizes.keys() - curves.keys(), sparsity)  # matrices without tokens
    return least_error(curves, {name: sizes[name] for name in curves}, sparsity) | unseen


ALLOCATIONS: dict[str, Callable[[Sensitivity], Mapping[str, float]]] = {
    "owl": owl,
    "error": by_error,
    "search": search,
}
