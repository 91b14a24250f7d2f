"""What a comparison says of its rows that an advice can rest on: increases with their intervals,
speeds, ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.evaluation.advice.hardware import is_measured
from secateur.evaluation.perplexity import perplexity_difference
from secateur.evaluation.results.schema import Results, Row

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Speed:
    """A row in a runtime. `ratio` is how many times as fast as the dense model in `against`, median
    and 95 % interval.

    `rate` compares rows across runtimes, more is faster: of decoding how many times as fast as the
    dense model in plain transformers, from the same rounds, median and 95 % interval; of prefill,
    which has no such figure, prompts a second, median and what 80 % of the rounds lie between.
    `seconds` is the median. `conditions`: dtype, batch, prompt.
    """

    row: Row
    runtime: str
    phase: str
    against: str
    ratio: Triple
    rate: Triple
    seconds: float
    conditions: tuple[str, int, int]

    @property
    def faster(self) -> bool:
        """Whether it is faster than the dense model in `against`: the interval of the ratio lies
        above 1.
        """
        return self.ratio[1] > 1

    @property
    def unsettled(self) -> bool:
        """Whether the interval of the ratio contains 1."""
        return self.ratio[1] <= 1 <= self.ratio[2]


def increase(row: Row, dense: Row) -> Triple:
    """Perplexity added to the dense model's, as a share of that, and its 95 % interval."""
    low, high = row.delta_interval
    return row.delta / dense.perplexity, low / dense.perplexity, high / dense.perplexity


def told_apart(one: Row, other: Row) -> tuple[bool, str]:
    """Whether the perplexities of two rows differ, and what says so.

    The paired interval where both hold their loss per window; else the ties of the table, for rows
    that are ranked against each other; else whether the intervals of their differences to the dense
    model are apart, which is strict.
    """
    if one.loss and len(one.loss) == len(other.loss):
        _, (low, high) = perplexity_difference(np.asarray(other.loss), np.asarray(one.loss))
        return not low <= 0 <= high, f"paired difference 95% interval {low:+.3g} to {high:+.3g}"
    if one.peers == other.peers and (one.rank or other.rank):
        tie = other.name in one.ties or one.name in other.ties
        return (
            not tie,
            "the paired difference may be zero"
            if tie
            else "the paired difference is apart from zero",
        )
    (low, high), (from_, to) = one.delta_interval, other.delta_interval
    apart = high < from_ or to < low
    return apart, "their intervals are apart" if apart else "their intervals overlap"


def speeds(
    results: Results, rows: Iterable[Row], hardware: str | None, runtime: str | None
) -> list[Speed]:
    """What was timed of rows on that hardware, in that runtime; None: in all.

    Decoding, or where no entry has it prefill. All under the conditions under which most was timed.
    """
    found = _timings(results, rows, hardware, runtime)
    counted = Counter(speed.conditions for speed in found)
    most = min(counted, key=lambda held: (-counted[held], held[1:], held[0]), default=None)
    return [speed for speed in found if speed.conditions == most]


def conditions(
    results: Results, rows: Iterable[Row], hardware: str | None, runtime: str | None
) -> set[tuple[str, int, int]]:
    """All conditions under which rows were timed there: dtype, batch, prompt."""
    return {speed.conditions for speed in _timings(results, rows, hardware, runtime)}


def _timings(
    results: Results, rows: Iterable[Row], hardware: str | None, runtime: str | None
) -> list[Speed]:
    entries = [
        (row, entry)
        for row in rows
        for entry in row.latency
        if runtime in (None, entry["runtime"])
        and is_measured(hardware, results.machine, entry["runtime"])
    ]
    phase = "decode" if any("decode" in entry for _, entry in entries) else "prefill"
    return [_speed(row, entry, phase) for row, entry in entries if phase in entry]


def _speed(row: Row, entry: dict[str, Any], phase: str) -> Speed:
    low, middle, high = entry[phase]
    rate = tuple(entry["over_eager"]) if phase == "decode" else (1 / middle, 1 / high, 1 / low)
    return Speed(
        row,
        entry["runtime"],
        phase,
        entry["against"],
        tuple(entry[f"{phase}_ratio"]),
        rate,
        middle,
        (entry["dtype"], entry["batch"], entry["prompt"]),
    )


def timed_runtimes(results: Results) -> set[str]:
    """The runtimes in which any row was timed."""
    return {entry["runtime"] for row in results.table for entry in row.latency}
