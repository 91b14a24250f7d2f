"""Which row of a comparison to take for a goal, and why: from what was measured, and from nothing
else.

A row counts as within the allowed increase of perplexity only if the upper end of its 95 % interval
is. One whose point estimate alone is within is named, with what would settle it, and not taken: the
limit is a promise, and the dense model, which keeps it, is always there. Where a goal needs what
was not measured nothing is chosen; what is known of such cases in general is said then, each
sentence labelled as prior (`priors`), with the command that measures it.

It does not prune or time anything, and does not weigh goals against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.deployment.runtimes import RUNTIMES
from secateur.deployment.sparsity_support import RULES
from secateur.errors import UnknownName
from secateur.evaluation.advice.evidence import increase, timed_runtimes
from secateur.evaluation.advice.goals import GOALS, KINDS, Choice, shown, title
from secateur.evaluation.advice.hardware import ACCELERATED, find_hardware, is_measured
from secateur.evaluation.advice.next_commands import measuring, tasks_of
from secateur.evaluation.advice.priors import STRUCTURED, known_of, known_of_hardware, priors
from secateur.evaluation.results.schema import Results, Row, check, find_tolerance, read_results
from secateur.system.settings import Goal

DEFAULT_INCREASE = 0.05
"""Of the dense perplexity, for every goal but quality, which has the least anyway."""


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` found. Row names are those of the table; `chosen` may be the dense model's,
    and is None where what the goal needs was not measured. All else is sentences; `measure` holds
    commands.

    `constraint` is what was asked for besides the goal, and whether it changed the answer.
    `not_considered` is what was not measured, or not shown, and `measure` what would measure it.
    `priors` are no measurements; each says so.
    """

    goal: str
    chosen: str | None
    kind: str | None
    runner_up: str | None
    constraint: str
    reasons: list[str]
    not_considered: list[str] = field(default_factory=list)
    measure: list[str] = field(default_factory=list)
    priors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """What a recommendation is wanted for; `limit` is a share of the dense perplexity, None:
    any.
    """

    goal: str
    limit: float | None
    hardware: str | None
    runtime: str | None


def recommend(
    results: Results | str | Path | None = None,
    *,
    goal: str,
    max_perplexity_increase: float | str | None = Goal.max_perplexity_increase,
    hardware: str | None = Goal.hardware,
    runtime: str | None = Goal.runtime,
) -> Recommendation:
    """The row of a comparison to take for `goal`: quality, latency, memory or portability.

    `results`: what `compare` returned, its `results.json` or the folder that has it; None: nothing
    was measured. `max_perplexity_increase` is relative to the dense perplexity, `5%` or 0.05;
    default 5 %, for quality none. Timings count where they were taken on `hardware`, in `runtime`.
    Raises UnknownName; BadPattern for an increase outside 0 to 1; BadResults.
    """
    if goal not in GOALS:
        raise UnknownName("goal", goal, GOALS)
    if runtime is not None and runtime not in {*RULES, *RUNTIMES}:
        raise UnknownName("runtime", runtime, {*RULES, *RUNTIMES})
    if hardware is not None:
        find_hardware(hardware)
        hardware = hardware.lower()
    limit = find_tolerance(max_perplexity_increase)
    asked = Asked(
        goal, DEFAULT_INCREASE if limit is None and goal != "quality" else limit, hardware, runtime
    )
    said = _limit(asked, default=limit is None)
    if results is None:
        return _unmeasured(asked, said, None, ["There are no results: nothing was measured."], [])
    held = results if isinstance(results, Results) else read_results(Path(results))
    check(held)
    return _from_rows(held, asked, said)


def _from_rows(results: Results, asked: Asked, said: str) -> Recommendation:
    dense, pruned = results.dense, _pruned(results)
    fitting = [row for row in pruned if _loads(row, asked.runtime)]
    within = [row for row in pruned if _admitted(row, dense, asked)]
    left = _left_out(results, asked, pruned, fitting)
    if not fitting:
        why = "No pruned row was measured" + (
            f" with the values that {asked.runtime} runs." if pruned else "."
        )
        return _unmeasured(asked, said, results, [why], left)
    choice = _choose(results, asked, within)
    if choice.row is None:
        where = "".join(
            f" {word} {name}"
            for word, name in (("in", asked.runtime), ("on", asked.hardware))
            if name
        )
        why = [f"No row that qualifies was {'timed' if asked.goal == 'latency' else 'run'}{where}."]
        if asked.hardware:
            why.append(
                f"The rows are from {_machine(results)}: run the command below on {asked.hardware}."
            )
        return _unmeasured(asked, said, results, why, left)
    reasons = choice.reasons if within else [_missed(fitting, dense, asked.limit)]
    head = "Keep the dense model." if choice.row is dense else f"Take {choice.row.name}."
    kind = [] if choice.row is dense else [f"It is {choice.row.kind}, {KINDS[choice.row.kind]}."]
    known = _known(results, asked, choice.row)
    lacking = (
        [asked.runtime]
        if known and asked.runtime and asked.goal != "portability"
        else _absent(results, asked)
    )
    measure = measuring(results, lacking, asked.hardware) if lacking else []
    if (
        choice.row is not dense
        and not choice.row.tasks
        and choice.row.checkpoint
        and choice.row.values == "as stored"
    ):
        left.append("Accuracy on tasks was not measured.")
        measure.append(tasks_of(results, choice.row))
    return Recommendation(
        asked.goal,
        choice.row.name,
        choice.row.kind,
        choice.runner_up.name if choice.runner_up else None,
        _binding(results, asked, said, choice.row),
        [head, *kind, *reasons, *_accuracy(choice.row)],
        [*left, *choice.not_considered],
        measure,
        known,
    )


def _missed(rows: Sequence[Row], dense: Row, limit: float | None) -> str:
    """That no row is within the limit, and by how much the nearest misses it."""
    near = min(rows, key=lambda row: increase(row, dense)[2])
    return (
        f"No row is within {_percent(limit)} of the dense perplexity. The upper end of the nearest, {near.name} "
        f"({near.kind}), is {increase(near, dense)[2] - (limit or 0):.2%} above that: {shown(near, dense)}."
    )


def _choose(results: Results, asked: Asked, rows: Sequence[Row]) -> Choice:
    return (
        GOALS[asked.goal](results, rows, asked.hardware, asked.runtime)
        if rows
        else Choice(results.dense)
    )


def _loads(row: Row, runtime: str | None) -> bool:
    """Whether a row's values are those that a runtime multiplies by: rounded in those that round,
    and in no others.
    """
    if runtime is None:
        return True
    return _rounds(runtime) == (row.values != "as stored")


def _rounds(runtime: str | None) -> bool:
    return runtime in RUNTIMES and RUNTIMES[runtime].rounded


def _pruned(results: Results) -> list[Row]:
    return [row for row in results.table if row.kind != "dense"]


def _admitted(row: Row, dense: Row, asked: Asked) -> bool:
    """Whether a row may be chosen: it runs there, and the upper end of its interval is within the
    limit.
    """
    return _loads(row, asked.runtime) and (
        asked.limit is None or increase(row, dense)[2] <= asked.limit
    )


def _unmeasured(
    asked: Asked, said: str, results: Results | None, reasons: list[str], left: list[str]
) -> Recommendation:
    """Nothing to choose from: what is known in general, and how to measure."""
    return Recommendation(
        asked.goal,
        None,
        None,
        None,
        said,
        ["Nothing measured answers this.", *reasons],
        left,
        measuring(
            results,
            [asked.runtime] if asked.runtime else [],
            asked.hardware,
            timed=asked.goal == "latency",
        ),
        priors(asked.goal, asked.hardware, asked.runtime),
    )


def _left_out(
    results: Results, asked: Asked, pruned: Sequence[Row], fitting: Sequence[Row]
) -> list[str]:
    """What is not considered, whatever the goal takes."""
    dense, said = results.dense, []
    if other := [row.name for row in pruned if row not in fitting]:
        does = "rounds" if _rounds(asked.runtime) else "does not round"
        said.append(
            f"{asked.runtime} {does} weights, so these rows are not its: {', '.join(other)}."
        )
    unsure = [
        row
        for row in fitting
        if asked.limit is not None
        and increase(row, dense)[0] <= asked.limit < increase(row, dense)[2]
    ]
    for row in unsure:
        said.append(
            f"{row.name} may be within {_percent(asked.limit)} or not: {shown(row, dense)}. More windows tell."
        )
    if asked.goal == "latency" and (absent := _absent(results, asked)):
        said.append(f"Runtimes in which nothing was timed: {', '.join(absent)}.")
    return said


def _absent(results: Results, asked: Asked) -> list[str]:
    """The runtimes that the machine has and in which nothing was timed, but for baselines; none
    where one was asked.
    """
    if asked.goal != "latency" or asked.runtime is not None:
        return []
    apart = timed_runtimes(results) | {runtime.twin for runtime in RUNTIMES.values()}
    if not results.machine["accelerators"]:
        apart |= set(ACCELERATED)
    return [
        name
        for name in RUNTIMES
        if name not in apart and is_measured(asked.hardware, results.machine, name)
    ]


def _known(results: Results, asked: Asked, row: Row) -> list[str]:
    """Priors, where a runtime or hardware was asked for in which the chosen row was not timed; and
    for portability.
    """
    if asked.goal == "portability":
        return priors(asked.goal, asked.hardware, asked.runtime)
    timed = any(
        asked.runtime in (None, entry["runtime"])
        and is_measured(asked.hardware, results.machine, entry["runtime"])
        for entry in row.latency
    )
    if timed or row.kind in ("dense", STRUCTURED):
        return []
    said = [] if asked.runtime is None else known_of(asked.runtime, "latency")
    return said if asked.hardware is None else [*said, known_of_hardware(asked.hardware)]


def _accuracy(row: Row) -> list[str]:
    """The difference of accuracy to the dense model, where tasks were measured."""
    mean = row.tasks.get("mean", {})
    if row.kind == "dense" or mean.get("delta") is None:
        return []
    low, high = mean["delta_interval"]
    tie = ", not told apart from the dense model" if low <= 0 <= high else ""
    return [
        f"Mean accuracy on tasks {mean['accuracy']:.1%}, {mean['delta']:+.1%} [{low:+.1%}, {high:+.1%}]{tie}."
    ]


def _limit(asked: Asked, default: bool) -> str:
    if asked.limit is None:
        return "No limit on perplexity was set."
    return f"Limit: at most {_percent(asked.limit)} more perplexity than the dense model{', the default' * default}."


def _binding(results: Results, asked: Asked, said: str, chosen: Row) -> str:
    """What was asked for besides the goal, and of each whether another row would be taken without
    it.
    """
    found = [said]
    for what, value, name in (
        ("limit", asked.limit, "it"),
        ("runtime", asked.runtime, asked.runtime),
        ("hardware", asked.hardware, asked.hardware),
    ):
        if value is None:
            continue
        loose = replace(asked, **{what: None})
        free = _choose(
            results,
            loose,
            [row for row in _pruned(results) if _admitted(row, results.dense, loose)],
        ).row
        if free is not None and free.name != chosen.name:
            found.append(
                f"Without {name} the answer is {title(free)}, {shown(free, results.dense)}."
            )
        elif what == "limit":
            found.append("It does not bind: without it the answer is the same.")
    return " ".join(found)


def _machine(results: Results) -> str:
    return " with ".join([results.machine["processor"], *results.machine["accelerators"]])


def _percent(limit: float | None) -> str:
    return f"{100 * (limit or 0):g}%"
