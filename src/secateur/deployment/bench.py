"""Times models in every runtime: prefill and decode apart, and how near to the machine's limit.

The dense model and the pruned ones take turns in every round, so that whatever else the machine
does falls on all of them; a ratio is the median over rounds of paired times, with a 95 % interval
by bootstrap. Before anything is timed, a fast runtime must give the logits that plain transformers
gives for the same folder; otherwise there is no figure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.runtimes import RUNTIMES, find_runtime
from secateur.deployment.runtimes.base import Running
from secateur.errors import UnsupportedModel
from secateur.kernels.packed import dense_product
from secateur.models.load import resolve
from secateur.system.clock import spread, timed
from secateur.system.devices import timed_dtype
from secateur.system.files import disk_errors
from secateur.system.intervals import bootstrap_interval
from secateur.system.json_files import write_json
from secateur.system.machine import machine, matrix_rate, typed_command, versions
from secateur.system.memory import PeakMemory, resident_bytes
from secateur.system.progress import Progress
from secateur.system.settings import TimedRuns, Trust

Key = tuple[str, str]  # a model and a runtime
Times = tuple[list[float], list[float]]  # seconds of each round: of a prefill, of a decoded token
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the logits of a runtime may be from those of plain transformers, ‖a − b‖ / ‖b‖."""
ROUNDED = 0.1
"""The same for a runtime that rounds the weights to few bits."""
SCHEMA = "secateur.bench/2"


@dataclass
class Timing:
    """One model in one runtime at one batch and prompt length.

    Seconds are [10 %, median, 90 %] over rounds. `prefill` is the time to the first token, `decode`
    that of one step of the whole batch. The ratios say how many times faster than the dense model
    in `against`: the same runtime where the dense model has one, else the runtime's twin, else
    `eager`; `over_eager` is that of decoding to the dense model in `eager`. Each is the median over
    rounds and its 95 % interval. `memory_bytes` is by how much the process's memory, mapped files
    included, grew at most while the model was loaded and ran once; `weight_bytes` are read for a
    token. Shares are of what the machine was measured to read (decoding: weights alone) and to
    multiply (prefill: the weights of the same model in `eager`).
    """

    model: str
    runtime: str
    batch: int
    prompt: int
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    tokens_per_second: float
    against: str
    prefill_ratio: tuple[float, float, float]
    decode_ratio: tuple[float, float, float]
    over_eager: tuple[float, float, float]
    memory_bytes: int | None
    weight_bytes: int
    share_of_bandwidth: float
    share_of_matrix_rate: float


@dataclass
class BenchResults:
    """What `bench` returns and writes; rates of the machine in bytes and operations a second."""

    schema: str
    command: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]
    dtype: str
    new_tokens: int
    rounds: int
    read_bandwidth: float
    matrix_rate: float
    timings: list[Timing] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def bench(
    models: Sequence[str | Path],
    *,
    dense: str | Path | None = None,
    runtimes: Sequence[str] = TimedRuns.runtimes,
    batch: Sequence[int] = TimedRuns.batch,
    prompt: Sequence[int] = TimedRuns.prompt,
    new: int = TimedRuns.new,
    rounds: int = TimedRuns.rounds,
    dtype: str = TimedRuns.dtype,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    out: str | Path | None = None,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> BenchResults:
    """Time models beside the model `dense` (None: the embedded demo) on this machine.

    `revision` is that of each of `models`, as the command's help says. Raises UnknownName,
    BadCheckpoint; UnsupportedModel where a runtime gives other outputs than plain transformers.
    """
    progress = progress or Progress()
    trust = Trust(trust_remote_code=trust_remote_code, revision=revision)
    runnable = {name: find_runtime(name) for name in dict.fromkeys(["eager", *runtimes])}
    kind = timed_dtype(dtype)
    folders = _folders(models, dense, trust)
    results = BenchResults(
        SCHEMA,
        typed_command(command),
        machine(),
        versions(),
        str(kind).removeprefix("torch."),
        new,
        rounds,
        read_bandwidth(),
        max(matrix_rate(kind), matrix_rate(torch.float32)),
    )
    twins = [runtime.twin for runtime in runnable.values() if runtime.twin]
    wanted = [("dense", name) for name in dict.fromkeys([*runnable, *twins])]
    wanted += [(name, runtime) for name in folders if name != "dense" for runtime in runnable]
    load = partial(_load, dtype=kind, trusted=trust_remote_code)
    loaded = _load_all(wanted, folders, load, results, progress)
    # `eager` may be there to compare with only.
    asked = [key for key in loaded if key[0] == "dense" or key[1] in runtimes]
    for size in batch:
        for length in prompt:
            progress.begin(f"timing batch {size}, prompt {length}")
            times = _times(loaded, asked, size, length, results, progress)
            results.timings += [_timing(key, times, loaded, size, length, results) for key in times]
    progress.end()
    if out is not None:
        with disk_errors(Path(out)):
            write_json(Path(out), asdict(results), finite=True)
    return results


def _folders(
    models: Sequence[str | Path], dense: str | Path | None, trust: Trust
) -> dict[str, Path]:
    """The checkpoint folders by the names in the table, `dense` first."""
    names = [Path(model).name for model in models]
    folders = {"dense": resolve(dense, replace(trust, revision=None))}
    for name, model in zip(names, models, strict=True):
        alone = names.count(name) == 1 and name != "dense"
        folders[name if alone else str(model)] = resolve(model, trust)
    for folder in folders.values():
        open_checkpoint(folder)
    return folders


def _load_all(
    wanted: Sequence[Key],
    folders: dict[str, Path],
    load: Callable[[str, Path], Running],
    results: BenchResults,
    progress: Progress,
) -> dict[Key, Running]:
    """Every model in every runtime that takes it; why not goes to `results.skipped`. Raises
    UnsupportedModel where one gives other outputs than plain transformers.
    """
    loaded: dict[Key, Running] = {}
    for name, runtime in wanted:
        progress.begin(f"loading {name} in {runtime}")
        try:
            model = loaded[name, runtime] = load(runtime, folders[name])
        except UnsupportedModel as error:
            results.skipped[f"{name} in {runtime}"] = str(error)
            continue
        if runtime != "eager":
            allowed = (
                ROUNDED if RUNTIMES[runtime].rounded else TOLERANCE[getattr(torch, results.dtype)]
            )
            _check_outputs(loaded[name, "eager"], model, f"{name} in {runtime}", allowed)
    return loaded


def _load(runtime: str, folder: Path, dtype: torch.dtype, *, trusted: bool) -> Running:
    """Raises UnsupportedModel where the runtime is missing here, or cannot run that model."""
    if (reason := RUNTIMES[runtime].missing()) is not None:
        raise UnsupportedModel(reason)
    trust = {"trust_remote_code": True} if trusted and RUNTIMES[runtime].runs_code else {}
    with PeakMemory(resident_bytes) as memory:
        before = memory.bytes or 0
        running = RUNTIMES[runtime].load(folder, dtype, **trust)
        running.prefill(_ids(running, 1, 8, 0))
    running.memory_bytes = None if memory.bytes is None else memory.bytes - before
    return running


def _ids(running: Running, batch: int, length: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(running.vocabulary, (batch, length), generator=draw)


def _check_outputs(plain: Running, fast: Running, what: str, tolerance: float) -> None:
    """Raise UnsupportedModel unless two models give the same logits and greedy tokens.

    A token that the plain model ranks as high as its own first, within the tolerance, counts as the
    same.
    """
    for wanted, got in _logits(plain, fast):
        difference = ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
        best = wanted.amax(1)
        behind = best - wanted.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
        greedy = (behind <= tolerance * (best - wanted.mean(1))).all()
        if not difference <= tolerance or not greedy:
            raise UnsupportedModel(
                f"{what} gives logits that differ by {difference:.1e} of their norm from plain "
                f"transformers'; {tolerance:g} and the same greedy tokens are wanted. "
                "Nothing was timed."
            )


def _logits(plain: Running, fast: Running) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of two models after a prompt, and after each of three more tokens."""
    ids = _ids(plain, 2, 8, 0)
    ask = getattr(fast, "logits", None)  # of a runtime that samples by itself
    try:
        yield plain.prefill(ids), (ask or fast.prefill)(ids)
    except UnsupportedModel:  # for single rows
        ids = ids[:1]
        yield plain.prefill(ids), (ask or fast.prefill)(ids)
    for seed in range(1, 4):
        token = _ids(plain, len(ids), 1, seed)
        ids = torch.cat([ids, token], 1)
        yield plain.decode(token), fast.decode(token) if ask is None else ask(ids)


def _times(
    loaded: dict[Key, Running],
    asked: Sequence[Key],
    batch: int,
    length: int,
    results: BenchResults,
    progress: Progress,
) -> dict[Key, Times]:
    """Time every model in turn, round after round, the first of which warms up."""
    times: dict[Key, Times] = {key: ([], []) for key in asked}
    for number in range(-1, results.rounds):
        for key in list(times):
            model = loaded[key]
            model.room = results.new_tokens
            ids = _ids(model, batch, length, number + 1)
            try:
                logits, prefill = timed(partial(model.prefill, ids))
            except UnsupportedModel as error:
                results.skipped[f"{key[0]} in {key[1]} at batch {batch}"] = str(error)
                del times[key]
                continue
            _, decode = timed(partial(_decode, model, logits, results.new_tokens))
            if number >= 0:
                times[key][0].append(prefill)
                times[key][1].append(decode / results.new_tokens)
        progress.advance("rounds", number + 1, results.rounds)
    return times


def _decode(model: Running, logits: Tensor, count: int) -> None:
    for _ in range(count):
        logits = model.decode(logits.argmax(-1, keepdim=True))


def _timing(
    key: Key,
    times: dict[Key, Times],
    loaded: dict[Key, Running],
    batch: int,
    length: int,
    results: BenchResults,
) -> Timing:
    """What the rounds of one model come to."""
    name, runtime = key
    (prefill, decode), model = times[key], loaded[key]
    choices = [runtime, RUNTIMES[runtime].twin, "eager"]
    against = next(other for other in choices if other and ("dense", other) in times)
    dense_prefill, dense_decode = times["dense", against]
    step = float(np.median(decode))
    weights = loaded[name, "eager"].weight_bytes / getattr(torch, results.dtype).itemsize
    return Timing(
        name,
        runtime,
        batch,
        length,
        spread(prefill),
        spread(decode),
        batch / step,
        against,
        _ratio(dense_prefill, prefill),
        _ratio(dense_decode, decode),
        _ratio(times["dense", "eager"][1], decode),
        model.memory_bytes,
        model.weight_bytes,
        model.weight_bytes / step / results.read_bandwidth,
        2 * weights * batch * length / float(np.median(prefill)) / results.matrix_rate,
    )


def _ratio(dense: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The median of the paired ratios, and its 95 % interval by bootstrap over rounds."""
    ratios = np.asarray(dense) / np.asarray(own)
    return float(np.median(ratios)), *bootstrap_interval(
        lambda chosen: np.median(ratios[chosen], axis=1), len(ratios), resamples=2000
    )


def read_bandwidth() -> float:
    """Bytes a second that a product reads of 256 MiB, more than a cache: the best of all tries."""
    weight = torch.ones(2**14, 2**13, dtype=torch.bfloat16)
    x = weight[0].clone()
    works = [lambda: weight.view(torch.float32).sum()] * 5
    if dense_product(weight, x) is not None:
        works += [lambda: dense_product(weight, x)] * 10
    return weight.nbytes / min(timed(work)[1] for work in works)
