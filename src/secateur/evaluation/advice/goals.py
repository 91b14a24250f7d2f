"""What each goal takes among the rows that are let in, and what it says of that: a function a goal,
in `GOALS`.

A goal filters the rows, orders them by a key, takes the first, and says in sentences of one form
why: what was found, what it costs, and how far the runner-up is. It measures nothing and knows no
priors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.evaluation.advice.evidence import Question, Speed, increase, speeds, told_apart
from secateur.evaluation.advice.hardware import timed_on
from secateur.evaluation.advice.priors import QUANTISED, SEMI, STRUCTURED, UNSTRUCTURED
from secateur.evaluation.report.tables import number, ratio
from secateur.evaluation.results.ranking import BAND, equal_bytes
from secateur.evaluation.results.schema import Results, Row
from secateur.methods.values import AS_STORED
from secateur.system.sizes import in_words

SAME_SIZE = 0.01
"""Sizes that differ by less are the same: two prunings pack to within a thousandth."""

KINDS: Mapping[str, str] = {
    "dense": "the model as it came",
    UNSTRUCTURED: "zeros anywhere: good where a format leaves zeros out or a runtime has kernels "
    "for them",
    SEMI: "N:M zeros: loads everywhere, good where a runtime and its hardware have kernels for 2:4",
    STRUCTURED: "a smaller dense model: good in every runtime that loads the dense one",
    QUANTISED: "all weights in fewer bits: good wherever a runtime reads the format",
}
"""What each kind of sparsity is good for; a row is never named without its kind."""


@dataclass
class Choice:
    """What a goal takes: a row, maybe the dense model's; None where what it needs is missing."""

    row: Row | None
    runner_up: Row | None = None
    reasons: list[str] = field(default_factory=list)
    not_considered: list[str] = field(default_factory=list)


def title(row: Row) -> str:
    """A row's name as sentences have it, never without its kind."""
    return "the dense model" if row.kind == "dense" else f"{row.name} ({row.kind})"


def shown(row: Row, dense: Row) -> str:
    """The perplexity of a row beside the dense model's."""
    if row.kind == "dense":
        return f"perplexity {number(row.perplexity)}"
    share, low, high = increase(row, dense)
    beside = f"{share:+.1%} [{low:+.1%}, {high:+.1%}] over the dense {number(dense.perplexity)}"
    return f"perplexity {number(row.perplexity)}, {beside}"


def _cost(row: Row, dense: Row) -> str:
    return f"Cost: {shown(row, dense)}."


def _runner_up(row: Row, how_far: str, dense: Row) -> str:
    return f"Runner-up: {title(row)}{how_far}; {shown(row, dense)}."


def quality(results: Results, rows: Sequence[Row], question: Question) -> Choice:
    """The row of least perplexity. Kinds are not equal, so the best of each stands beside it."""
    ordered = sorted(rows, key=lambda row: row.perplexity)
    best, second, dense = ordered[0], next(iter(ordered[1:]), None), results.dense
    reasons = [f"Least perplexity of {_count(rows)}: {shown(best, dense)}."]
    if best.delta_interval[1] < 0:
        reasons.append("That is less than the dense model's own.")
    elif best.delta_interval[0] <= 0:
        reasons.append("The interval contains 0: no loss against the dense model is shown.")
    if second:
        apart, why = told_apart(best, second)
        more = f"{second.perplexity - best.perplexity:+.3g} perplexity"
        reasons.append(
            _runner_up(second, f", {more}, {'behind' if apart else 'a tie'}: {why}", dense)
        )
    if best.recovered:
        spent = f"{best.recovered.tokens:,} tokens, {best.recovered.seconds:.0f} s"
        bare = next((row for row in ordered if not row.recovered), None)
        without = f" Best without: {bare.name}, {shown(bare, dense)}." if bare else ""
        reasons.append(f"It was fine-tuned after pruning: {spent}.{without}")
    best_of_kind: dict[str, Row] = {}
    for row in ordered:
        best_of_kind.setdefault(row.kind, row)
    if len(best_of_kind) > 1:
        reasons += [
            f"Best {kind} row: {row.name}, {shown(row, dense)}; {KINDS[kind]}."
            for kind, row in best_of_kind.items()
        ]
    first: dict[str, list[str]] = {}
    for row in ordered:
        if row.rank.startswith("1"):
            pattern = f"{row.pattern} recovered" if row.recovered else row.pattern
            first.setdefault(pattern, []).append(row.method)
    if len(first) > 1:
        places = [f"{pattern} {' and '.join(methods)}" for pattern, methods in first.items()]
        tied = [f"{place} (a tie)" if " and " in place else place for place in places]
        reasons.append(f"First at each pattern: {', '.join(tied)}.")
    if len({row.pattern for row in ordered}) > 1:
        reasons.append(
            "Kinds and amounts are not equal: least perplexity favours what removes least."
        )
    return Choice(best, second, reasons)


def latency(results: Results, rows: Sequence[Row], question: Question) -> Choice:
    """The row that decodes fastest, among those that are faster than the dense model with intervals
    apart from 1.

    Small gains by zeros that the runtime is not known to use do not count (`evidence.CHANCE`): they
    would cost quality. A row in another runtime than the dense model's fastest one has to beat that
    too, intervals apart: otherwise the dense model there would do as well.
    """
    dense = results.dense
    timed, other_conditions = speeds(results, rows, question)
    if not timed:
        return Choice(None)
    dense_speeds, _ = speeds(results, [dense], replace(question, runtime=None))
    comparable = [
        speed
        for speed in dense_speeds
        if speed.conditions == timed[0].conditions and question.runtime in (None, speed.runtime)
    ]
    plain = max(comparable, key=_rate, default=None)
    left = _not_timed(results, rows, timed, question.runtime)
    left += [
        f"{speed.row.name} in {speed.runtime}, {ratio(speed.ratio)} times as fast: "
        f"taken for chance, since {speed.runtime} is not known to use such zeros. "
        "More rounds tell: secateur bench --rounds 40."
        for speed in timed
        if speed.chance
    ]
    if other_conditions:
        conditions = "; ".join(map(_condition, other_conditions))
        left.append(f"Timings under other conditions: {conditions}.")
    gains = [speed for speed in timed if speed.faster and not speed.chance]
    winners = [
        speed
        for speed in gains
        if plain is None
        or plain.runtime in (speed.runtime, speed.against)
        or speed.rate[1] > plain.rate[2]
    ]
    if not winners:
        return Choice(dense, None, _no_gain(timed, gains, plain, question.runtime), left)
    best = max(winners, key=_rate)
    second = max((speed for speed in winners if speed.row is not best.row), key=_rate, default=None)
    reasons = [_as_measured(results, best)]
    if best.doubted:
        reasons.append(f"Doubt it: {best.runtime} is not known to use such zeros. Time it again.")
    reasons.append(_cost(best.row, dense))
    if second is None:
        reasons.append("No other row that qualifies was shown to be faster than the dense model.")
        return Choice(best.row, dense, reasons, left)
    tie = second.rate[2] >= best.rate[1]
    how = "a tie: the intervals overlap" if tie else "behind, intervals apart"
    rates = f"{ratio(second.rate)} against {ratio(best.rate)}"
    reasons.append(_runner_up(second.row, f" in {second.runtime}, {rates}, {how}", dense))
    return Choice(best.row, second.row, reasons, left)


def memory(results: Results, rows: Sequence[Row], question: Question) -> Choice:
    """The row of least bytes: of weights in the runtime asked for, else of the stored files.

    In a runtime it is `weight_bytes`, which is exact; `memory_bytes`, by how much a process grew,
    differs between equal models by more than they differ from smaller ones. Among sizes within
    `SAME_SIZE` of the least the lower perplexity decides.
    """
    dense, runtime, left = results.dense, question.runtime, list[str]()
    sizes, whole = {row.name: row.disk_bytes for row in rows}, dense.disk_bytes
    what, where = "on disk", ""
    if runtime is not None:
        timed, _ = speeds(results, rows, question)
        if not timed or not _entry(dense, timed[0].against):
            return Choice(None)
        sizes = {speed.row.name: _entry(speed.row, runtime)["weight_bytes"] for speed in timed}
        what, where = f"of weights read for a token in {runtime}", f" in {timed[0].against}"
        whole = _entry(dense, timed[0].against)["weight_bytes"]
        absent = (row for row in rows if row.name not in sizes)
        left = [f"{title(row)} was not run in {runtime}." for row in absent]
    small = [row for row in rows if sizes.get(row.name, whole) < whole * (1 - SAME_SIZE)]
    if not small:
        fewer = f"fewer bytes {what} than the dense model's {_bytes(whole)}{where}"
        reasons = [
            f"No row that qualifies has {fewer}.",
            "Zeros in a plain checkpoint save no bytes.",
        ]
        return Choice(dense, None, reasons, left)
    same_size = min(sizes[row.name] for row in small) * (1 + SAME_SIZE)

    def by_size(row: Row) -> tuple[bool, float, float]:
        size = sizes[row.name]
        return (False, row.perplexity, size) if size <= same_size else (True, size, row.perplexity)

    best, second, *_ = [*sorted(small, key=by_size), dense]
    size, other = sizes[best.name], sizes.get(second.name, whole)
    reasons = [f"{_bytes(size)} {what}, the dense model {_bytes(whole)}{where}."]
    if runtime is not None and (grown := _entry(best, runtime).get("memory_bytes")):
        grew = f"Loading and running it made the process grow by {_bytes(grown)}"
        reasons.append(f"{grew}, which includes the work.")
    decided = "the same size, so the lower perplexity decided"
    how = decided if other <= same_size else f"{other / size - 1:.1%} more"
    reasons += [_cost(best, dense), _runner_up(second, f", {_bytes(other)}, {how}", dense)]
    if best.values != AS_STORED and runtime is None:
        reasons += _at_equal_bytes(results, best)
    return Choice(best, second, reasons, left)


def _at_equal_bytes(results: Results, best: Row) -> list[str]:
    """Whether zeros or fewer bits are the better use of the bytes of a row on a grid."""
    plain = best.kind == QUANTISED
    rivals = [
        row
        for row in results.pruned
        if (row.kind == QUANTISED) != plain and row.values != AS_STORED and equal_bytes(row, best)
    ]
    what = "pruned row" if plain else "row that is quantised and not pruned"
    start = "Quantise, do not prune: " if plain else ""
    if not rivals:
        return [f"No {what} was measured at these bytes, ±{BAND:.0%}."]
    rival = min(rivals, key=lambda row: row.perplexity)
    apart, why = told_apart(best, rival)
    how = "a tie" if not apart else "behind" if rival.perplexity > best.perplexity else "ahead"
    start = start if how == "behind" else ""
    more = f"{rival.perplexity - best.perplexity:+.3g} perplexity"
    beside = f"{title(rival)} is the best {what} at equal bytes, {more}, {how}: {why}"
    return [f"{start}{beside}; {shown(rival, results.dense)}."]


def portability(results: Results, rows: Sequence[Row], question: Question) -> Choice:
    """The smallest structured row in a stock checkpoint, which every loader takes as dense; else
    the dense model.

    All such rows are equally portable, so the size that the limit allows decides, then the lower
    perplexity.
    """
    dense = results.dense
    stock = [row for row in rows if row.values == AS_STORED]
    smaller = [row for row in stock if row.kind == STRUCTURED]
    zeros, left_out = len(stock) - len(smaller), []
    if zeros:
        why = "since their checkpoints are the dense model's with zeros in it"
        left_out = [f"Left out, {why}: {_count(range(zeros))}."]
    if not smaller:
        return Choice(dense, None, ["No structured row qualifies.", *left_out])
    ordered = sorted(smaller, key=lambda row: (row.parameters or float("inf"), row.perplexity))
    best, second, *_ = [*ordered, dense]
    reasons = ["A stock dense configuration with fewer numbers in it: every loader takes it."]
    if best.parameters and dense.parameters:
        share = f"{best.parameters / dense.parameters:.1%}"
        reasons.append(f"{best.parameters:,} of {dense.parameters:,} parameters ({share}).")
    parameters = f", {second.parameters or 0:,} parameters"
    reasons += [_cost(best, dense), _runner_up(second, parameters, dense), *left_out]
    return Choice(best, second, reasons)


GOALS: Mapping[str, Callable[[Results, Sequence[Row], Question], Choice]] = {
    goal.__name__: goal for goal in (quality, latency, memory, portability)
}
"""The goals by their names."""


def _as_measured(results: Results, speed: Speed) -> str:
    """How fast a row is, with the conditions."""
    decodes = speed.phase == "decode"
    does, step = ("decodes", "step") if decodes else ("takes a prompt", "prompt")
    over = f", {ratio(speed.rate)} times the dense model in eager" if decodes else ""
    where = f"{_condition(speed.conditions)}, {timed_on(results.machine, speed.runtime)}"
    return (
        f"In {speed.runtime} it {does} {ratio(speed.ratio)} times as fast as the dense model in "
        f"{speed.against}{over}: {1e3 * speed.seconds:.3g} ms a {step} ({where})."
    )


def _condition(conditions: tuple[str, int, int]) -> str:
    dtype, batch, prompt = conditions
    return f"{dtype}, batch {batch}, prompt {prompt}"


def _not_timed(
    results: Results, rows: Sequence[Row], timed: Sequence[Speed], runtime: str | None
) -> list[str]:
    """Which rows were not timed, in one runtime or in any, with the reason where there is one."""
    reasons, explained = list[str](), {speed.row.name for speed in timed}
    for what, why in results.not_timed.items():
        named = (row.name for row in rows if what == row.name or what.startswith(f"{row.name}:"))
        _, within, where = what.rpartition(" in ")
        if (name := next(named, None)) and (not within or runtime in (None, where)):
            reasons.append(f"{name}{within}{where if within else ''}: not timed, {why}")
            explained.add(name)
    there = "" if runtime is None else f" in {runtime}"
    absent = (row.name for row in rows if row.name not in explained)
    return [*reasons, *(f"{name}{there}: not timed." for name in absent)]


def _no_gain(
    timed: Sequence[Speed], gains: Sequence[Speed], plain: Speed | None, runtime: str | None
) -> list[str]:
    """Why no row was shown to be faster, the nearest one first."""
    slower = "No row that qualifies was shown to be faster than the dense model"
    reasons = [f"{slower}, of {len(timed)} timings."]
    if gains and plain:
        near = max(gains, key=_rate)
        reasons.append(
            f"The dense model in {plain.runtime} stands at {ratio(plain.rate)}, the best row, "
            f"{title(near.row)} in {near.runtime}, at {ratio(near.rate)}: "
            "not faster with intervals apart."
        )
        return reasons
    near = max(timed, key=lambda speed: speed.ratio)
    if plain and runtime is None and plain.runtime != near.runtime:
        fastest = f"The dense model is fastest in {plain.runtime}"
        reasons.append(f"{fastest}, of the runtimes that were timed.")
    why = "its interval contains 1, so it is not faster" if near.unsettled else "it is slower"
    why = "taken for chance" if near.faster else why
    times = f"{ratio(near.ratio)} times the dense speed in {near.against}"
    return [*reasons, f"Nearest: {title(near.row)} in {near.runtime}, {times}: {why}."]


def _rate(speed: Speed) -> float:
    return speed.rate[0]


def _entry(row: Row, runtime: str) -> dict[str, Any]:
    """The timing of a row in a runtime; empty where there is none."""
    return next((entry for entry in row.latency if entry["runtime"] == runtime), {})


def _bytes(count: int) -> str:
    return in_words(count) if count >= 2**10 else f"{count} bytes"


def _count(rows: Sequence[Any]) -> str:
    return "one row" if len(rows) == 1 else f"{len(rows)} rows"
