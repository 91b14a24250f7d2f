"""What each goal takes among the rows that are let in, and what it says of that: a function a goal,
in `GOALS`.

A function gets the comparison, the pruned rows that satisfy what was asked for, and the hardware
and runtime. It measures nothing and knows no priors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.evaluation.advice.evidence import Speed, conditions, increase, speeds, told_apart
from secateur.evaluation.advice.hardware import place
from secateur.evaluation.advice.priors import SEMI, STRUCTURED, UNSTRUCTURED, uses_zeros
from secateur.evaluation.report.tables import number
from secateur.evaluation.results.schema import Results, Row
from secateur.system.sizes import in_words

SAME_SIZE = 0.01
"""Sizes that differ by less are the same: what is kept of two prunings packs to within a
thousandth.
"""

CHANCE = 1.1
"""A gain whose interval begins below this is taken for chance where the runtime is not known to use
such zeros: it does the same work as with the dense model, and of a dozen such timings one begins
above 1.
"""

KINDS: Mapping[str, str] = {
    "dense": "the model as it came",
    UNSTRUCTURED: "zeros anywhere: good where a format leaves zeros out or a runtime has kernels for them",
    SEMI: "N:M zeros: loads everywhere, good where a runtime and its hardware have kernels for 2:4",
    STRUCTURED: "a smaller dense model: good in every runtime that loads the dense one",
}
"""What each kind of sparsity is good for; a row is never named without its kind."""


@dataclass
class Choice:
    """What a goal takes: a row, which may be the dense model's; None where nothing that it needs
    was measured.
    """

    row: Row | None
    runner_up: Row | None = None
    reasons: list[str] = field(default_factory=list)
    not_considered: list[str] = field(default_factory=list)


def title(row: Row) -> str:
    """A row's name as sentences have it, never without its kind."""
    return "the dense model" if row.kind == "dense" else f"{row.name} ({row.kind})"


def shown(row: Row, dense: Row) -> str:
    """The perplexity of a row beside the dense model's."""
    middle, low, high = increase(row, dense)
    if row.kind == "dense":
        return f"perplexity {number(row.perplexity)}"
    beside = f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"
    return (
        f"perplexity {number(row.perplexity)}, {beside} over the dense {number(dense.perplexity)}"
    )


def quality(
    results: Results, rows: Sequence[Row], hardware: str | None, runtime: str | None
) -> Choice:
    """The row of least perplexity. Kinds are not equal, so the best of each kind stands beside
    it.
    """
    ordered = sorted(rows, key=lambda row: row.perplexity)
    best, dense = ordered[0], results.dense
    choice = Choice(best, ordered[1] if len(ordered) > 1 else None)
    choice.reasons.append(f"Least perplexity of {_count(len(rows))}: {shown(best, dense)}.")
    if best.delta_interval[1] < 0:
        choice.reasons.append("That is less than the dense model's own.")
    elif best.delta_interval[0] <= 0:
        choice.reasons.append("The interval contains 0: no loss against the dense model is shown.")
    if choice.runner_up:
        choice.reasons.append(_behind(best, choice.runner_up, dense))
    if best.recovered:
        bare = next((row for row in ordered if not row.recovered), None)
        choice.reasons.append(
            f"It was fine-tuned after pruning: {best.recovered.tokens:,} tokens, {best.recovered.seconds:.0f} s."
            + (f" Best without: {bare.name}, {shown(bare, dense)}." if bare else "")
        )
    kinds = dict.fromkeys(row.kind for row in ordered)
    if len(kinds) > 1:
        for kind in kinds:
            first = next(row for row in ordered if row.kind == kind)
            choice.reasons.append(
                f"Best {kind} row: {first.name}, {shown(first, dense)}; {KINDS[kind]}."
            )
    first_places: dict[str, list[str]] = {}
    for row in ordered:
        if row.rank.startswith("1"):
            place = f"{row.pattern} recovered" if row.recovered else row.pattern
            first_places.setdefault(place, []).append(row.method)
    if len(first_places) > 1:
        places = (
            f"{pattern} {' and '.join(methods)}{_tied(methods)}"
            for pattern, methods in first_places.items()
        )
        choice.reasons.append(f"First at each pattern: {', '.join(places)}.")
    if len({row.pattern for row in ordered}) > 1:
        choice.reasons.append(
            "Kinds and amounts are not equal: least perplexity favours what removes least."
        )
    return choice


def _tied(methods: Sequence[str]) -> str:
    return " (a tie)" if len(methods) > 1 else ""


def latency(
    results: Results, rows: Sequence[Row], hardware: str | None, runtime: str | None
) -> Choice:
    """The row that decodes fastest, among those that are faster than the dense model with intervals
    apart from 1.

    Small gains by zeros that the runtime is not known to use do not count (`CHANCE`): they would
    cost quality. A row in another runtime than the dense model's fastest one has to beat that too,
    intervals apart: otherwise the dense model there would do as well.
    """
    timed = speeds(results, rows, hardware, runtime)
    missing = [row for row in rows if row.name not in {speed.row.name for speed in timed}]
    if not timed:
        return Choice(None)
    known = [
        speed
        for speed in speeds(results, [results.dense], hardware, None)
        if speed.conditions == timed[0].conditions
    ]
    plain = max(
        (speed for speed in known if runtime in (None, speed.runtime)), key=_rate, default=None
    )
    chance = [
        speed for speed in timed if speed.faster and speed.ratio[1] < CHANCE and _doubted(speed)
    ]
    winners = [
        speed for speed in timed if speed.faster and speed not in chance and _beats(speed, plain)
    ]
    left = _not_timed(results, rows, missing, runtime)
    left += [
        f"{speed.row.name} in {speed.runtime}, {_span(speed.ratio)} times as fast: taken for chance, since "
        f"{speed.runtime} is not known to use such zeros. More rounds tell: secateur bench --rounds 40."
        for speed in chance
    ]
    if others := conditions(results, rows, hardware, runtime) - {timed[0].conditions}:
        left.append(
            "Timings under other conditions: "
            + "; ".join(_condition(one) for one in sorted(others))
            + "."
        )
    if not winners:
        return Choice(results.dense, None, _no_gain(timed, plain, runtime), left)
    best = max(winners, key=_rate)
    second = max((speed for speed in winners if speed.row is not best.row), key=_rate, default=None)
    choice = Choice(
        best.row, second.row if second else results.dense, [_speed(results, best)], left
    )
    if _doubted(best):
        choice.reasons.append(
            f"Doubt it: {best.runtime} is not known to use such zeros. Time it again."
        )
    choice.reasons.append(f"Cost: {shown(best.row, results.dense)}.")
    if second is None:
        choice.reasons.append(
            "No other row that qualifies was shown to be faster than the dense model."
        )
    else:
        tie = second.rate[2] >= best.rate[1]
        how = "a tie: the intervals overlap" if tie else "behind, intervals apart"
        choice.reasons.append(
            f"Runner-up: {title(second.row)} in {second.runtime}, {_span(second.rate)} against {_span(best.rate)}, "
            f"{how}; {shown(second.row, results.dense)}."
        )
    return choice


def memory(
    results: Results, rows: Sequence[Row], hardware: str | None, runtime: str | None
) -> Choice:
    """The row of least bytes: of weights in the runtime that is asked for, else of the stored
    files.

    In a runtime it is `weight_bytes`, which is exact; `memory_bytes`, by how much a process grew,
    differs between equal models by more than they differ from smaller ones. Among sizes within
    `SAME_SIZE` of the least the lower perplexity decides.
    """
    dense, left = results.dense, []
    if runtime is None:
        sizes, what, where = {row.name: row.disk_bytes for row in rows}, "on disk", ""
        whole = dense.disk_bytes
    else:
        timed = speeds(results, rows, hardware, runtime)
        if not timed or all(entry["runtime"] != timed[0].against for entry in dense.latency):
            return Choice(None)
        sizes = {speed.row.name: _weights(speed.row, runtime) for speed in timed}
        what, where = f"of weights read for a token in {runtime}", f" in {timed[0].against}"
        whole = _weights(dense, timed[0].against)
        left = [
            f"{row.name} ({row.kind}) was not run in {runtime}."
            for row in rows
            if row.name not in sizes
        ]
    small = [row for row in rows if sizes.get(row.name, whole) < whole * (1 - SAME_SIZE)]
    if not small:
        said = f"No row that qualifies has fewer bytes {what} than the dense model's {_bytes(whole)}{where}."
        return Choice(dense, None, [said, "Zeros in a plain checkpoint save no bytes."], left)
    least = min(sizes[row.name] for row in small)
    ordered = sorted(
        small,
        key=lambda row: (sizes[row.name] > least * (1 + SAME_SIZE), *_by_size(row, sizes, least)),
    )
    best = ordered[0]
    second = ordered[1] if len(ordered) > 1 else dense
    choice = Choice(
        best,
        second,
        [f"{_bytes(sizes[best.name])} {what}, the dense model {_bytes(whole)}{where}."],
        left,
    )
    if runtime is not None and (grown := _grown(best, runtime)):
        choice.reasons.append(
            f"Loading and running it made the process grow by {_bytes(grown)}, which includes the work."
        )
    choice.reasons.append(f"Cost: {shown(best, dense)}.")
    other = sizes.get(second.name, whole)
    same = other <= least * (1 + SAME_SIZE)
    how = (
        "the same size, so the lower perplexity decided"
        if same
        else f"{other / sizes[best.name] - 1:.1%} more"
    )
    choice.reasons.append(
        f"Runner-up: {title(second)}, {_bytes(other)}, {how}; {shown(second, dense)}."
    )
    if best.values != "as stored" and runtime is None:
        choice.reasons.append(
            f"Its values are rounded to {best.values}, which saves bytes without any zeros too."
        )
        choice.not_considered.append(
            f"The dense model rounded to {best.values} is not in this table."
        )
    return choice


def portability(
    results: Results, rows: Sequence[Row], hardware: str | None, runtime: str | None
) -> Choice:
    """The smallest structured row in a stock checkpoint, which every loader takes as dense; else
    the dense model.

    All such rows are equally portable, so the size that the limit allows decides, then the lower
    perplexity.
    """
    dense = results.dense
    stock = [row for row in rows if row.kind == STRUCTURED and row.values == "as stored"]
    ordered = sorted(stock, key=lambda row: (_parameters(row), row.perplexity))
    zeros = [row for row in rows if row.kind != STRUCTURED and row.values == "as stored"]
    said = (
        [
            f"Left out, since their checkpoints are the dense model's with zeros in it: {_count(len(zeros))}."
        ]
        if zeros
        else []
    )
    if not ordered:
        return Choice(dense, None, ["No structured row qualifies.", *said])
    best = ordered[0]
    second = ordered[1] if len(ordered) > 1 else dense
    choice = Choice(
        best,
        second,
        ["A stock dense configuration with fewer numbers in it: every loader takes it."],
    )
    if best.parameters and dense.parameters:
        choice.reasons.append(
            f"{best.parameters:,} of {dense.parameters:,} parameters ({best.parameters / dense.parameters:.1%})."
        )
    choice.reasons.append(f"Cost: {shown(best, dense)}.")
    choice.reasons.append(
        f"Runner-up: {title(second)}, {second.parameters or 0:,} parameters; {shown(second, dense)}."
    )
    choice.reasons += said
    return choice


GOALS: Mapping[str, Callable[[Results, Sequence[Row], str | None, str | None], Choice]] = {
    "quality": quality,
    "latency": latency,
    "memory": memory,
    "portability": portability,
}
"""The goals."""


def _behind(best: Row, second: Row, dense: Row) -> str:
    apart, why = told_apart(best, second)
    return (
        f"Runner-up: {title(second)}, {second.perplexity - best.perplexity:+.3g} perplexity, "
        f"{'behind' if apart else 'a tie'}: {why}; {shown(second, dense)}."
    )


def _doubted(speed: Speed) -> bool:
    """Whether a gain has no known cause: zeros, in a runtime whose rule says that it does not use
    them.
    """
    rows = speed.conditions[1] * (1 if speed.phase == "decode" else speed.conditions[2])
    return (
        speed.row.kind != STRUCTURED and uses_zeros(speed.runtime, speed.row.pattern, rows) is False
    )


def _beats(speed: Speed, plain: Speed | None) -> bool:
    """Whether a row that is faster than its own dense baseline also beats the dense model's fastest
    runtime.
    """
    return (
        plain is None
        or plain.runtime in (speed.runtime, speed.against)
        or speed.rate[1] > plain.rate[2]
    )


def _speed(results: Results, speed: Speed) -> str:
    does = "decodes" if speed.phase == "decode" else "takes a prompt"
    time = f"{1e3 * speed.seconds:.3g} ms a {'step' if speed.phase == 'decode' else 'prompt'}"
    over = (
        f", {_span(speed.rate)} times the dense model in eager" if speed.phase == "decode" else ""
    )
    return (
        f"In {speed.runtime} it {does} {_span(speed.ratio)} times as fast as the dense model in {speed.against}{over}: "
        f"{time} ({_condition(speed.conditions)}, {place(results.machine, speed.runtime)})."
    )


def _condition(held: tuple[str, int, int]) -> str:
    return f"{held[0]}, batch {held[1]}, prompt {held[2]}"


def _not_timed(
    results: Results, rows: Sequence[Row], missing: Sequence[Row], runtime: str | None
) -> list[str]:
    """Which rows were not timed, with the reason where the comparison has one; in one runtime, or
    in any.
    """
    said, told = [], set[str]()
    for what, why in results.not_timed.items():
        row = next(
            (row for row in rows if what == row.name or what.startswith(f"{row.name}:")), None
        )
        if row is not None and (
            runtime is None or " in " not in what or what.endswith(f" in {runtime}")
        ):
            where = what[what.rindex(" in ") :] if " in " in what else ""
            said.append(f"{row.name}{where}: not timed, {why}")
            told.add(row.name)
    there = "" if runtime is None else f" in {runtime}"
    return said + [f"{row.name}{there}: not timed." for row in missing if row.name not in told]


def _no_gain(timed: Sequence[Speed], plain: Speed | None, runtime: str | None) -> list[str]:
    """Why no row was shown to be faster, the nearest one first."""
    gains = [
        speed
        for speed in timed
        if speed.faster and not (_doubted(speed) and speed.ratio[1] < CHANCE)
    ]
    near = max(gains or timed, key=_rate if gains else lambda speed: speed.ratio)
    said = [
        f"No row that qualifies was shown to be faster than the dense model, of {len(timed)} timings."
    ]
    if gains and plain:
        return [
            *said,
            f"The dense model in {plain.runtime} stands at {_span(plain.rate)}, the best row, {title(near.row)} in "
            f"{near.runtime}, at {_span(near.rate)}: not faster with intervals apart.",
        ]
    if plain and runtime is None and plain.runtime != near.runtime:
        said.append(
            f"The dense model is fastest in {plain.runtime}, of the runtimes that were timed."
        )
    why = "its interval contains 1, so it is not faster" if near.unsettled else "it is slower"
    if near.faster:
        why = "taken for chance"
    return [
        *said,
        f"Nearest: {title(near.row)} in {near.runtime}, {_span(near.ratio)} times the dense speed in {near.against}: "
        f"{why}.",
    ]


def _rate(speed: Speed) -> float:
    return speed.rate[0]


def _weights(row: Row, runtime: str) -> int:
    return next(entry["weight_bytes"] for entry in row.latency if entry["runtime"] == runtime)


def _grown(row: Row, runtime: str) -> int | None:
    return next(entry.get("memory_bytes") for entry in row.latency if entry["runtime"] == runtime)


def _by_size(row: Row, sizes: Mapping[str, int], least: int) -> tuple[float, float]:
    """Among the least, by perplexity; among the others, by size."""
    size = sizes[row.name]
    return (row.perplexity, size) if size <= least * (1 + SAME_SIZE) else (size, row.perplexity)


def _parameters(row: Row) -> float:
    return float("inf") if row.parameters is None else row.parameters


def _span(held: tuple[float, float, float]) -> str:
    return f"{held[0]:.2f} [{held[1]:.2f}, {held[2]:.2f}]"


def _bytes(count: int) -> str:
    return in_words(count) if count >= 2**10 else f"{count} bytes"


def _count(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"
