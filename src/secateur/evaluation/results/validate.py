"""What a comparison from elsewhere must hold beyond its schema, so that pages and advice can be
made of it.
"""

from __future__ import annotations

import re
from typing import Any

from secateur.errors import BadResults
from secateur.evaluation.results.schema import KINDS, MOST_LOSS, Results, Row
from secateur.system.json_files import fits

MACHINE = {"processor": str, "system": str, "threads": int, "accelerators": list}
TEXT = {"source": str, "split": str, "samples": int, "length": int, "sha256": str}
ENTRY = {
    "runtime": str,
    "dtype": str,
    "against": str,
    "batch": int,
    "prompt": int,
    "weight_bytes": int,
}
REACH = {"method": str, "allocation": str, "most": float, "certain": bool, "note": str}


def check(results: Results, name: str = "The comparison") -> None:
    """Raise BadResults unless all that is read beyond the schema is there and of its type; `name`
    is what it is of.
    """
    try:
        _has(results.machine, MACHINE, "its machine")
        if not all(isinstance(name, str) for name in results.machine["accelerators"]):
            raise ValueError("its machine has accelerators without names")
        _has(results.model, {"name": str, "parameters": int}, "its model")
        if not results.calibrations:
            raise ValueError("it names no calibration text")
        for text in (*results.calibrations, results.evaluation):
            _text(text)
        for row in results.rows:
            _row(row)
            if row.loss and len(row.loss) != results.evaluation["samples"]:
                raise ValueError(
                    f"{row.name} has {len(row.loss)} losses of {results.evaluation['samples']} windows"
                )
        _tolerance(results.tolerance)
    except ValueError as error:
        raise BadResults(f"{name} cannot be used: {error}. Run the comparison again.") from error


def _text(text: dict[str, Any]) -> None:
    _has(text, TEXT, "one of its texts")
    if type(text.get("seed")) not in (int, type(None)):
        raise ValueError(f"one of its texts has seed {text.get('seed')!r}")


def _row(row: Row) -> None:
    if not re.fullmatch(r"|\d{1,6}|\d{1,6}-\d{1,6} tie", row.rank):
        raise ValueError(f"{row.name} has rank {row.rank!r}")
    if row.kind not in KINDS:
        raise ValueError(f"{row.name} has kind {row.kind!r}; {', '.join(KINDS)} are known")
    if not row.perplexity > 0 or not row.delta_interval[0] <= row.delta_interval[1]:
        raise ValueError(
            f"{row.name} has perplexity {row.perplexity} and interval {row.delta_interval}"
        )
    if row.disk_bytes <= 0 or not all(0 <= loss < MOST_LOSS for loss in row.loss):
        raise ValueError(f"{row.name} has {row.disk_bytes} bytes, or losses that no model has")
    if row.recovered is not None:
        _text(row.recovered.text)
    for entry in row.latency:
        _timed(entry, f"a timing of {row.name}")
    if row.tasks and "mean" not in row.tasks:
        raise ValueError(f"{row.name} has tasks without a mean")
    for task, found in row.tasks.items():
        if lacking := {"accuracy", "stderr", "delta", "delta_interval"} - found.keys():
            raise ValueError(f"{row.name} has no {min(lacking)} on {task}")
        numbers = [found["accuracy"], *([] if found["stderr"] is None else [found["stderr"]])]
        numbers += [] if found["delta"] is None else [found["delta"], *_pair(found)]
        if (
            not all(map(_number, numbers))
            or type(found.get("items" if task != "mean" else "tasks")) is not int
        ):
            raise ValueError(
                f"{row.name} has no accuracy on {task} with a difference and its interval"
            )


def _tolerance(held: dict[str, Any]) -> None:
    """Raise ValueError for what is no search for a tolerance."""
    found = held.get("found", [])
    if not held:
        return
    if not _number(held.get("share")) or not isinstance(found, list):
        raise ValueError("its tolerance is no share with what was found")
    for reach in found:
        _has(reach if isinstance(reach, dict) else {}, REACH, "what was found for the tolerance")
        texts = [reach.get("pattern"), reach.get("beyond")]
        if not all(type(text) in (str, type(None)) for text in texts) or (
            reach.get("perplexity") is not None
        ) != (reach.get("pattern") is not None and _number(reach["perplexity"])):
            raise ValueError("what was found for the tolerance has no pattern with its perplexity")


def _pair(mean: dict[str, Any]) -> list[Any]:
    held = mean.get("delta_interval")
    return list(held) if isinstance(held, (list, tuple)) and len(held) == 2 else [None]


def _timed(entry: dict[str, Any], what: str) -> None:
    _has(entry, ENTRY, what)
    if "decode" not in entry and "prefill" not in entry:
        raise ValueError(f"{what} has neither decode nor prefill")
    names = [
        name
        for phase in ("decode", "prefill")
        if phase in entry
        for name in (phase, f"{phase}_ratio")
    ]
    for name in names + (["over_eager"] if "decode" in entry else []):
        held = entry.get(name)
        if (
            not isinstance(held, (list, tuple))
            or len(held) != 3
            or not all(_number(part) and part > 0 for part in held)
        ):
            raise ValueError(f"{what} has {name} {held!r}; three positive numbers were wanted")
    if "decode" in entry and not (
        _number(entry.get("tokens_per_second")) and type(entry.get("new_tokens")) is int
    ):
        raise ValueError(f"{what} has no tokens_per_second or new_tokens")
    if "decode" in entry and "prefill_ratio" not in entry:
        raise ValueError(f"{what} has decode without a prefill_ratio")
    if entry["weight_bytes"] <= 0 or type(entry.get("memory_bytes")) not in (int, type(None)):
        raise ValueError(f"{what} has weight_bytes or memory_bytes that are no sizes")


def _has(held: dict[str, Any], wanted: dict[str, type], what: str) -> None:
    for name, kind in wanted.items():
        if type(held.get(name)) is not kind:
            raise ValueError(f"{what} has {name} {held.get(name)!r}; {kind.__name__} was wanted")


def _number(value: Any) -> bool:
    return fits(value, float)
