"""Which row of a comparison to take for a goal, and why: from what was measured, and from nothing
else.

A row counts as within the allowed increase of perplexity only if the upper end of its 95 % interval
is. One whose point estimate alone is within is named, with what would settle it, and not taken: the
limit is a promise, and the dense model, which keeps it, is always there. Where a goal needs what
was not measured nothing is chosen; what is known of such cases in general is said then, each
sentence labelled as prior (`priors`), with the command that measures it.

It does not prune or time anything, and does not weigh goals against each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.deployment.runtimes import RUNTIMES
from secateur.deployment.sparsity_support import RUNTIME_FACTS
from secateur.errors import UnknownName
from secateur.evaluation.advice.evidence import Question, increase
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
    chosen: str | None = None
    kind: str | None = None
    runner_up: str | None = None
    constraint: str = ""
    reasons: list[str] = field(default_factory=list)
    not_considered: list[str] = field(default_factory=list)
    measure: list[str] = field(default_factory=list)
    priors: list[str] = field(default_factory=list)


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
    if runtime is not None and runtime not in RUNTIME_FACTS:
        raise UnknownName("runtime", runtime, RUNTIME_FACTS)
    if hardware is not None:
        find_hardware(hardware)
        hardware = hardware.lower()
    limit, default = find_tolerance(max_perplexity_increase), ""
    if limit is None and goal != "quality":
        limit, default = DEFAULT_INCREASE, ", the default"
    allowed = f"Limit: at most {_percent(limit)} more perplexity than the dense model{default}."
    constraint = "No limit on perplexity was set." if limit is None else allowed
    question = Question(goal, limit, hardware, runtime)
    if results is None:
        choice = Choice(None, reasons=["There are no results: nothing was measured."])
        return _unmeasured(question, constraint, None, choice)
    results = results if isinstance(results, Results) else read_results(Path(results))
    check(results)
    return _from_rows(results, question, constraint)


def _from_rows(results: Results, question: Question, constraint: str) -> Recommendation:
    dense, pruned = results.dense, results.pruned
    fitting = [row for row in pruned if question.loads(row)]
    within = [row for row in pruned if question.admits(row, dense)]
    left = _left_out(results, question, pruned, fitting)
    if not fitting:
        values = f" with the values that {question.runtime} runs" if pruned else ""
        choice = Choice(None, None, [f"No pruned row was measured{values}."], left)
        return _unmeasured(question, constraint, results, choice)
    choice = _choose(results, question, within)
    if (row := choice.row) is None:
        choice = Choice(None, None, _not_measured_there(results, question), left)
        return _unmeasured(question, constraint, results, choice)
    known = _known(results, question, row)
    reasons = ["Keep the dense model."]
    if row is not dense:
        reasons = [f"Take {row.name}.", f"It is {row.kind}, {KINDS[row.kind]}."]
    reasons += choice.reasons if within else [_missed(fitting, dense, question.limit)]
    lacking = _absent(results, question)
    if known and question.runtime and question.goal != "portability":
        lacking = [question.runtime]
    measure = measuring(results, lacking, question.hardware) if lacking else []
    if row is not dense and not row.tasks and row.checkpoint and row.values == "as stored":
        left.append("Accuracy on tasks was not measured.")
        measure.append(tasks_of(results, row))
    return Recommendation(
        question.goal,
        chosen=row.name,
        kind=row.kind,
        runner_up=choice.runner_up.name if choice.runner_up else None,
        constraint=_binding(results, question, constraint, row),
        reasons=[*reasons, *_accuracy(row)],
        not_considered=[*left, *choice.not_considered],
        measure=measure,
        priors=known,
    )


def _unmeasured(
    question: Question, constraint: str, results: Results | None, choice: Choice
) -> Recommendation:
    """Nothing to choose from: what is known in general, and how to measure."""
    goal, hardware, runtime = question.goal, question.hardware, question.runtime
    runtimes = [runtime] if runtime else []
    return Recommendation(
        goal,
        constraint=constraint,
        reasons=["Nothing measured answers this.", *choice.reasons],
        not_considered=choice.not_considered,
        measure=measuring(results, runtimes, hardware, timed=goal == "latency"),
        priors=priors(goal, hardware, runtime),
    )


def _not_measured_there(results: Results, question: Question) -> list[str]:
    """That no row was timed, or run, in the runtime and on the hardware that were asked for."""
    where = f" in {question.runtime}" if question.runtime else ""
    where += f" on {question.hardware}" if question.hardware else ""
    done = "timed" if question.goal == "latency" else "run"
    reasons = [f"No row that qualifies was {done}{where}."]
    if question.hardware:
        machine = " with ".join([results.machine["processor"], *results.machine["accelerators"]])
        again = f"run the command below on {question.hardware}"
        reasons.append(f"The rows are from {machine}: {again}.")
    return reasons


def _missed(rows: Sequence[Row], dense: Row, limit: float | None) -> str:
    """That no row is within the limit, and by how much the nearest misses it."""
    near = min(rows, key=lambda row: increase(row, dense)[2])
    above = f"{increase(near, dense)[2] - (limit or 0):.2%} above that"
    return (
        f"No row is within {_percent(limit)} of the dense perplexity. The upper end of the "
        f"nearest, {title(near)}, is {above}: {shown(near, dense)}."
    )


def _choose(results: Results, question: Question, rows: Sequence[Row]) -> Choice:
    return GOALS[question.goal](results, rows, question) if rows else Choice(results.dense)


def _left_out(
    results: Results, question: Question, pruned: Sequence[Row], fitting: Sequence[Row]
) -> list[str]:
    """What is not considered, whatever the goal takes."""
    dense, limit, sentences = results.dense, question.limit, list[str]()
    if other := [row.name for row in pruned if row not in fitting]:
        does = f"rounds to {question.rounds}" if question.rounds else "does not round weights"
        rows = f"these rows are not its: {', '.join(other)}"
        sentences.append(f"{question.runtime} {does}, so {rows}.")
    for row in fitting:
        estimate, _, upper = increase(row, dense)
        if limit is not None and estimate <= limit < upper:
            unsure = f"{row.name} may be within {_percent(limit)} or not"
            sentences.append(f"{unsure}: {shown(row, dense)}. More windows tell.")
    if absent := _absent(results, question):
        sentences.append(f"Runtimes in which nothing was timed: {', '.join(absent)}.")
    return sentences


def _absent(results: Results, question: Question) -> list[str]:
    """The runtimes of the machine, but for baselines, in which nothing was timed. None where one
    was asked for, or another goal.
    """
    if question.goal != "latency" or question.runtime is not None:
        return []
    timed = {entry["runtime"] for row in results.table for entry in row.latency}
    without = timed | {runtime.twin for runtime in RUNTIMES.values()}
    if not results.machine["accelerators"]:
        without |= set(ACCELERATED)
    return [
        name
        for name in RUNTIMES
        if name not in without and is_measured(question.hardware, results.machine, name)
    ]


def _known(results: Results, question: Question, row: Row) -> list[str]:
    """Priors, for portability and where the chosen row was not timed on what was asked for."""
    hardware, runtime = question.hardware, question.runtime
    if question.goal == "portability":
        return priors(question.goal, hardware, runtime)
    if question.timings(results, row) or row.kind in ("dense", STRUCTURED):
        return []
    return [
        *(known_of(runtime, "latency") if runtime else ()),
        *([known_of_hardware(hardware)] if hardware else ()),
    ]


def _accuracy(row: Row) -> list[str]:
    """The difference of accuracy to the dense model, where tasks were measured."""
    mean = row.tasks.get("mean", {})
    if row.kind == "dense" or mean.get("delta") is None:
        return []
    low, high = mean["delta_interval"]
    tie = ", not told apart from the dense model" if low <= 0 <= high else ""
    difference = f"{mean['delta']:+.1%} [{low:+.1%}, {high:+.1%}]"
    return [f"Mean accuracy on tasks {mean['accuracy']:.1%}, {difference}{tie}."]


def _binding(results: Results, question: Question, constraint: str, chosen: Row) -> str:
    """What was asked for besides the goal, and whether each changes which row is taken."""
    dense, sentences = results.dense, [constraint]
    for what in ("limit", "runtime", "hardware"):
        if (value := getattr(question, what)) is None:
            continue
        loose = replace(question, **{what: None})
        admitted = [row for row in results.pruned if loose.admits(row, dense)]
        row = _choose(results, loose, admitted).row
        if row is not None and row.name != chosen.name:
            without = f"Without {'it' if what == 'limit' else value}"
            sentences.append(f"{without} the answer is {title(row)}, {shown(row, dense)}.")
        elif what == "limit":
            sentences.append("It does not bind: without it the answer is the same.")
    return " ".join(sentences)


def _percent(limit: float | None) -> str:
    return f"{100 * (limit or 0):g}%"
