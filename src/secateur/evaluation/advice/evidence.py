"""What a comparison says of its rows that advice can rest on: increases with their intervals,
speeds, ties.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.deployment.runtimes import RUNTIMES, runs_values
from secateur.evaluation.advice.hardware import is_measured
from secateur.evaluation.advice.priors import STRUCTURED, uses_zeros
from secateur.evaluation.perplexity import perplexity_difference
from secateur.evaluation.results.schema import Results, Row
from secateur.methods.values import AS_STORED

Triple = tuple[float, float, float]
"""A figure and its 95 % interval."""

CHANCE = 1.1
"""A gain whose interval begins below this is taken for chance where the runtime is not known to use
such zeros: it does the same work as with the dense model, and of a dozen such timings one begins
above 1.
"""


@dataclass(frozen=True)
class Question:
    """What a recommendation is wanted for; `limit` is a share of the dense perplexity, None: any.

    Timings count where they were taken on `hardware`, in `runtime`; None: in all.
    """

    goal: str
    limit: float | None
    hardware: str | None
    runtime: str | None

    @property
    def rounds(self) -> str:
        """The values that the runtime rounds weights to; empty where it does not."""
        return RUNTIMES[self.runtime].rounded if self.runtime in RUNTIMES else ""

    def loads(self, row: Row) -> bool:
        """Whether a row has the values that the runtime rounds to, and else values as stored."""
        if self.runtime in RUNTIMES:
            return runs_values(RUNTIMES[self.runtime], row.values)
        return self.runtime is None or row.values == AS_STORED

    def admits(self, row: Row, dense: Row) -> bool:
        """Whether a row runs there, with the upper end of its interval within the limit."""
        within = self.limit is None or increase(row, dense)[2] <= self.limit
        return within and self.loads(row)

    def timings(self, results: Results, row: Row) -> list[dict[str, Any]]:
        """The timings of a row that count."""
        return [
            entry
            for entry in row.latency
            if self.runtime in (None, entry["runtime"])
            and is_measured(self.hardware, results.machine, entry["runtime"])
        ]


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
        """Whether it is faster than the dense model: the interval lies above 1."""
        return self.ratio[1] > 1

    @property
    def unsettled(self) -> bool:
        """Whether the interval of the ratio contains 1."""
        return self.ratio[1] <= 1 <= self.ratio[2]

    @property
    def doubted(self) -> bool:
        """Whether a gain has no known cause: zeros that the runtime's rule says it does not use."""
        _, batch, prompt = self.conditions
        rows = batch * (1 if self.phase == "decode" else prompt)
        zeros = self.row.kind != STRUCTURED
        return zeros and uses_zeros(self.runtime, self.row.pattern, rows) is False

    @property
    def chance(self) -> bool:
        """Whether it is faster, and that is taken for chance."""
        return self.faster and self.ratio[1] < CHANCE and self.doubted


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
        if other.name in one.ties or one.name in other.ties:
            return False, "the paired difference may be zero"
        return True, "the paired difference is apart from zero"
    (low, high), (other_low, other_high) = one.delta_interval, other.delta_interval
    apart = high < other_low or other_high < low
    return apart, f"their intervals {'are apart' if apart else 'overlap'}"


def speeds(
    results: Results, rows: Iterable[Row], question: Question
) -> tuple[list[Speed], list[tuple[str, int, int]]]:
    """The speeds of rows under the conditions under which most was timed, and the other conditions.

    Of decoding, or where no timing that counts has it of prefill.
    """
    timings = [(row, entry) for row in rows for entry in question.timings(results, row)]
    phase = "decode" if any("decode" in entry for _, entry in timings) else "prefill"
    timed = [_speed(row, entry, phase) for row, entry in timings if phase in entry]
    counts = Counter(speed.conditions for speed in timed)
    most = min(counts, key=lambda one: (-counts[one], *one[1:], one), default=None)
    return [speed for speed in timed if speed.conditions == most], sorted({*counts} - {most})


def _speed(row: Row, entry: dict[str, Any], phase: str) -> Speed:
    low, median, high = entry[phase]
    rate = tuple(entry["over_eager"]) if phase == "decode" else (1 / median, 1 / high, 1 / low)
    conditions, ratio = (entry["dtype"], entry["batch"], entry["prompt"]), entry[f"{phase}_ratio"]
    runtime, against = entry["runtime"], entry["against"]
    return Speed(row, runtime, phase, against, tuple(ratio), rate, median, conditions)
