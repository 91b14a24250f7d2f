"""One clock for every runtime: prefill and decode apart, dense and pruned in turn, and how near to
the machine's limit.

The dense model and the pruned ones take turns in every round, so that whatever else the machine
does falls on all of them; a ratio is the median over rounds of paired times, with a 95 % interval
by bootstrap. Before anything is timed, a fast runtime must give the logits that plain transformers
gives for the same folder; otherwise there is no figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.runtimes import RUNTIMES, Running, find_runtime
from secateur.errors import UnsupportedModel
from secateur.kernels.packed import dense_product
from secateur.models.load import resolve
from secateur.system.devices import timed_dtype
from secateur.system.files import disk_errors
from secateur.system.json_files import json_text
from secateur.system.machine import machine, matrix_rate, typed_command, versions
from secateur.system.memory import PeakMemory, resident_bytes
from secateur.system.progress import Progress
from secateur.system.settings import TimedRuns

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the logits of a runtime may be from those of plain transformers, ‖a − b‖ / ‖b‖."""
ROUNDED = 0.1
"""The same for a runtime that rounds the weights to few bits."""
SCHEMA = "secateur.bench/2"


@dataclass
class Timing:
    """One model in one runtime at one batch and prompt length. Seconds are [10 %, median, 90 %]
    over rounds.

    `prefill` is the time to the first token, `decode` that of one step of the whole batch. The
    ratios say how many times faster than the dense model in `against`: the same runtime where the
    dense model has one, else the runtime's twin, else `eager`; `over_eager` is that of decoding to
    the dense model in `eager`. Each is the median over rounds and its 95 % interval. `memory_bytes`
    is by how much the process's memory, mapped files included, grew at most while the model was
    loaded and ran once; `weight_bytes` are read for a token. Shares are of what the machine was
    measured to read (decoding: weights alone) and to multiply (prefill: the weights of the same
    model in `eager`).
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
    timings: list[Timing]
    skipped: dict[str, str]

    def json(self) -> str:
        return json_text(asdict(self), finite=True)


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
    out: str | Path | None = None,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> BenchResults:
    """Time `models` (checkpoint folders) beside the model `dense` (None: the embedded demo) on this
    machine's CPU.

    Raises UnknownName, BadCheckpoint; UnsupportedModel where a runtime gives other outputs than
    plain transformers.
    """
    progress = progress or Progress()
    found = {name: find_runtime(name) for name in dict.fromkeys(["eager", *runtimes])}
    kind = timed_dtype(dtype)
    names = [Path(model).name for model in models]
    alone = [
        name if names.count(name) == 1 and name != "dense" else str(m)
        for name, m in zip(names, models, strict=True)
    ]
    folders = {
        "dense": resolve(dense),
        **{name: resolve(m) for name, m in zip(alone, models, strict=True)},
    }
    for folder in folders.values():
        open_checkpoint(folder)
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
        [],
        {},
    )
    twins = [runtime.twin for runtime in found.values() if runtime.twin]
    wanted = [("dense", name) for name in dict.fromkeys([*found, *twins])]
    wanted += [(name, runtime) for name in alone for runtime in found]
    loaded: dict[tuple[str, str], Loaded] = {}
    for name, runtime in wanted:
        progress.begin(f"loading {name} in {runtime}")
        try:
            loaded[name, runtime] = held = _load(runtime, folders[name], kind)
        except UnsupportedModel as error:
            results.skipped[f"{name} in {runtime}"] = str(error)
            continue
        if runtime != "eager":
            allowed = ROUNDED if RUNTIMES[runtime].rounded else TOLERANCE[kind]
            _same_outputs(
                loaded[name, "eager"].running, held.running, f"{name} in {runtime}", allowed
            )
    asked = [
        key for key in loaded if key[0] == "dense" or key[1] in runtimes
    ]  # eager may be there to compare with
    for size in batch:
        for length in prompt:
            progress.begin(f"timing batch {size}, prompt {length}")
            results.timings += _timed(loaded, asked, size, length, kind, results, progress)
    progress.end()
    if out is not None:
        with disk_errors(Path(out)):
            Path(out).write_text(results.json(), encoding="utf-8")
    return results


@dataclass
class Loaded:
    """A model in a runtime, and the memory that it took."""

    running: Running
    memory_bytes: int | None


def _load(runtime: str, folder: Path, dtype: torch.dtype) -> Loaded:
    """Raises UnsupportedModel where the runtime is missing here, or cannot run that model."""
    if (reason := RUNTIMES[runtime].missing()) is not None:
        raise UnsupportedModel(reason)
    with PeakMemory(resident_bytes) as memory:
        before = memory.bytes or 0
        running = RUNTIMES[runtime].load(folder, dtype)
        running.prefill(_ids(running, 1, 8, 0))
    return Loaded(running, None if memory.bytes is None else memory.bytes - before)


def _ids(running: Running, batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(
        running.vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def _same_outputs(plain: Running, fast: Running, what: str, tolerance: float) -> None:
    """Raise UnsupportedModel unless prefill and three decoded tokens give the same logits and
    greedy tokens.

    A token that the plain model ranks as high as its own first, within the tolerance, counts as the
    same.
    """
    for wanted, got in _logits(plain, fast):
        difference = ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
        behind = wanted.amax(1) - wanted.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
        if (
            not difference <= tolerance
            or (behind > tolerance * (wanted.amax(1) - wanted.mean(1))).any()
        ):
            raise UnsupportedModel(
                f"{what} gives logits that differ by {difference:.1e} of their norm from plain transformers'; "
                f"{tolerance:g} and the same greedy tokens are wanted. Nothing was timed."
            )


def _logits(plain: Running, fast: Running) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of both after a prompt and after three more tokens. One that samples by itself is
    asked apart.
    """
    ids = _ids(plain, 2, 8, 0)
    ask = getattr(fast, "logits", None)
    try:
        yield plain.prefill(ids), fast.prefill(ids) if ask is None else ask(ids)
    except UnsupportedModel:  # for single rows
        ids = ids[:1]
        yield plain.prefill(ids), fast.prefill(ids) if ask is None else ask(ids)
    for seed in range(1, 4):
        token = _ids(plain, len(ids), 1, seed)
        ids = torch.cat([ids, token], 1)
        yield plain.decode(token), fast.decode(token) if ask is None else ask(ids)


def _timed(
    loaded: dict[tuple[str, str], Loaded],
    asked: Sequence[tuple[str, str]],
    batch: int,
    length: int,
    kind: torch.dtype,
    results: BenchResults,
    progress: Progress,
) -> list[Timing]:
    prefill: dict[tuple[str, str], list[float]] = {key: [] for key in asked}
    decode: dict[tuple[str, str], list[float]] = {key: [] for key in asked}
    for number in range(-1, results.rounds):
        for key in list(prefill):
            model = loaded[key].running
            model.room = results.new_tokens
            ids = _ids(model, batch, length, number + 1)
            try:
                started = perf_counter()
                logits = model.prefill(ids)
                first = perf_counter()
            except UnsupportedModel as error:
                results.skipped[f"{key[0]} in {key[1]} at batch {batch}"] = str(error)
                del prefill[key], decode[key]
                continue
            for _ in range(results.new_tokens):
                logits = model.decode(logits.argmax(-1, keepdim=True))
            done = perf_counter()
            if number >= 0:  # the first round warms up
                prefill[key].append(first - started)
                decode[key].append((done - first) / results.new_tokens)
        progress.advance("rounds", number + 1, results.rounds)
    timings = []
    for key in prefill:
        name, runtime = key
        choices = [runtime, RUNTIMES[runtime].twin, "eager"]
        against = next(other for other in choices if other and ("dense", other) in prefill)
        before, step = ("dense", against), float(np.median(decode[key]))
        multiplied = 2 * loaded[name, "eager"].running.weight_bytes / kind.itemsize * batch * length
        timings.append(
            Timing(
                *key,
                batch,
                length,
                _spread(prefill[key]),
                _spread(decode[key]),
                batch / step,
                against,
                _ratio(prefill[before], prefill[key]),
                _ratio(decode[before], decode[key]),
                _ratio(decode["dense", "eager"], decode[key]),
                loaded[key].memory_bytes,
                loaded[key].running.weight_bytes,
                loaded[key].running.weight_bytes / step / results.read_bandwidth,
                multiplied / float(np.median(prefill[key])) / results.matrix_rate,
            )
        )
    return timings


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.percentile(seconds, [10, 50, 90])
    return float(low), float(middle), float(high)


def _ratio(dense: Sequence[float], mine: Sequence[float]) -> tuple[float, float, float]:
    """The median of the paired ratios, and its 95 % interval by bootstrap over rounds."""
    ratios = np.asarray(dense) / np.asarray(mine)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def read_bandwidth() -> float:
    """Bytes a second that a product reads of 256 MiB, more than the cache: the best of ten, ours or
    torch's sum.
    """
    held = torch.ones(2**14, 2**13, dtype=torch.bfloat16)
    x = held[0].clone()
    best = min(_seconds(lambda: held.view(torch.float32).sum()) for _ in range(5))
    if dense_product(held, x) is not None:
        best = min(best, *(_seconds(lambda: dense_product(held, x)) for _ in range(10)))
    return held.numel() * 2 / best


def _seconds(call: Any) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
