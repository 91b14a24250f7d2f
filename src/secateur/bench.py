"""One clock for every runtime: prefill and decode apart, dense and pruned in turn, and how near to the machine's limit.

The dense model and the pruned ones take turns in every round, so that whatever else the machine does falls on all of
them; a ratio is the median over rounds of paired times, with a 95 % interval by bootstrap. Before anything is timed, a
fast runtime must give the logits that plain transformers gives for the same folder; otherwise there is no figure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoint import disk_errors, open_checkpoint, resolve
from secateur.errors import UnknownName, UnsupportedModel
from secateur.machine import machine, versions
from secateur.options import find_dtype
from secateur.packed import dense_product
from secateur.progress import Progress
from secateur.runtimes import Running, find_runtime

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the logits of a runtime may be from those of plain transformers, ‖a − b‖ / ‖b‖."""
SCHEMA = "secateur.bench/1"


@dataclass
class Timing:
    """One model in one runtime at one batch and length. Seconds are [10 %, median, 90 %] over rounds.

    `decode` is for one step of the whole batch. The ratios say how many times faster than the dense model in the same
    runtime, where that has one, else in `eager`: median over rounds, and its 95 % interval.
    """

    model: str
    runtime: str
    batch: int
    prompt: int
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    prefill_ratio: tuple[float, float, float]
    decode_ratio: tuple[float, float, float]
    weight_bytes: int
    share_of_bandwidth: float


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
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def bench(
    models: Sequence[str | Path],
    *,
    dense: str | Path | None = None,
    runtimes: Sequence[str] = ("eager", "packed"),
    batch: Sequence[int] = (1,),
    prompt: Sequence[int] = (128,),
    new: int = 32,
    rounds: int = 8,
    dtype: str = "bfloat16",
    out: str | Path | None = None,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> BenchResults:
    """Time `models` (checkpoint folders) beside the model `dense` (None: the embedded demo) on this machine's CPU.

    Raises UnknownName, BadCheckpoint; UnsupportedModel where a runtime gives other outputs than plain transformers.
    """
    progress = progress or Progress()
    found = {name: find_runtime(name) for name in dict.fromkeys(["eager", *runtimes])}
    kinds = {str(kind).removeprefix("torch."): kind for kind in TOLERANCE}
    if (kind := kinds.get(find_dtype(dtype))) is None:
        raise UnknownName("dtype that can be timed", dtype, kinds)
    names = [Path(model).name for model in models]
    alone = [
        name if names.count(name) == 1 and name != "dense" else str(m) for name, m in zip(names, models, strict=True)
    ]
    folders = {"dense": resolve(dense), **{name: resolve(m) for name, m in zip(alone, models, strict=True)}}
    for folder in folders.values():
        open_checkpoint(folder)
    results = BenchResults(
        SCHEMA, list(command or sys.argv), machine(), versions(), str(kind).removeprefix("torch."), new, rounds,
        read_bandwidth(), matrix_rate(kind), [], {},
    )  # fmt: skip
    running: dict[tuple[str, str], Running] = {}
    for name, folder in folders.items():
        for runtime, how in found.items():
            progress.begin(f"loading {name} in {runtime}")
            reason = how.missing()
            try:
                if reason is None:
                    running[name, runtime] = how.load(folder, kind)
                    _same_outputs(running[name, "eager"], running[name, runtime], name, runtime, TOLERANCE[kind])
            except UnsupportedModel as error:
                reason = str(error)
                if (name, runtime) in running:
                    raise
            if reason is not None:
                results.skipped[f"{name} in {runtime}"] = reason
    for size in batch:
        for length in prompt:
            progress.begin(f"timing batch {size}, prompt {length}")
            results.timings += _timed(running, size, length, new, rounds, results.read_bandwidth, progress)
    progress.end()
    if out is not None:
        with disk_errors(Path(out)):
            Path(out).write_text(results.json(), encoding="utf-8")
    return results


def _ids(running: Running, batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(running.vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _same_outputs(plain: Running, fast: Running, name: str, runtime: str, tolerance: float) -> None:
    """Raise UnsupportedModel unless prefill and three decoded tokens give the same logits."""
    if plain is fast:
        return
    ids = _ids(plain, 2, 8, 0)
    pairs = [(plain.prefill(ids), fast.prefill(ids))]
    for seed in range(1, 4):
        token = _ids(plain, 2, 1, seed)
        pairs.append((plain.decode(token), fast.decode(token)))
    for wanted, got in pairs:
        difference = ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"{name} in {runtime} gives logits that differ by {difference:.1e} of their norm from plain "
                f"transformers'; {tolerance:g} is allowed. Nothing was timed."
            )


def _timed(
    running: dict[tuple[str, str], Running], batch: int, length: int, new: int, rounds: int, bandwidth: float,
    progress: Progress,
) -> list[Timing]:  # fmt: skip
    prefill: dict[tuple[str, str], list[float]] = {key: [] for key in running}
    decode: dict[tuple[str, str], list[float]] = {key: [] for key in running}
    for number in range(-1, rounds):
        for key, model in running.items():
            ids = _ids(model, batch, length, number + 1)
            started = perf_counter()
            logits = model.prefill(ids)
            first = perf_counter()
            for _ in range(new):
                logits = model.decode(logits.argmax(-1, keepdim=True))
            done = perf_counter()
            if number >= 0:  # the first round warms up
                prefill[key].append(first - started)
                decode[key].append((done - first) / new)
        progress.advance("rounds", number + 1, rounds)
    timings = []
    for key, model in running.items():
        against = ("dense", key[1]) if ("dense", key[1]) in running else ("dense", "eager")
        timings.append(
            Timing(
                *key,
                batch,
                length,
                _spread(prefill[key]),
                _spread(decode[key]),
                _ratio(prefill[against], prefill[key]),
                _ratio(decode[against], decode[key]),
                model.weight_bytes,
                model.weight_bytes / float(np.median(decode[key])) / bandwidth,
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
    """Bytes a second that a product reads of 256 MiB, more than the cache: the best of ten, ours or torch's sum."""
    held = torch.ones(2**14, 2**13, dtype=torch.bfloat16)
    x = held[0].clone()
    best = min(_seconds(lambda: held.view(torch.float32).sum()) for _ in range(5))
    if dense_product(held, x) is not None:
        best = min(best, *(_seconds(lambda: dense_product(held, x)) for _ in range(10)))
    return held.numel() * 2 / best


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two 1024 x 1024 matrices, the best of five."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / min(_seconds(lambda: a @ a) for _ in range(5))


def _seconds(call: Any) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
