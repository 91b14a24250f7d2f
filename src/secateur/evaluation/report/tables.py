"""What a comparison says, as sheets of text: the same for a terminal, a Markdown page and the page
for a browser.

Columns for speed appear where it was measured, each figure with its runtime, and there is none
otherwise; so do those for tasks. No sheet stands without its calibration size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.evaluation.results.schema import Recovered, Results, Row
from secateur.methods.patterns import share_of
from secateur.system.sizes import in_words

FIRST = ("method", "pattern", "kind")
"""The columns that name a row; whatever is left out, these stand."""
NARROW = (*FIRST, "perplexity", "difference [95 % interval]", "rank")
"""The columns that fit a terminal of 80 characters."""
COLUMNS = (
    *FIRST,
    "sparsity",
    "perplexity",
    "difference [95 % interval]",
    "rank",
    "KL",
    "top-1",
    "parameters",
    "seconds",
    "peak memory",
    "on disk",
)
SPEED = ("tokens/s", "runtime", "over eager", "over its dense", "first token")
TASKS = ("tasks", "difference on tasks")
Figure = tuple[str, float | str]
"""What is shown, and what it is sorted by."""


@dataclass(frozen=True)
class Sheet:
    """A table with a title and a caption. `groups` numbers the lines that belong together."""

    title: str
    columns: tuple[str, ...]
    lines: list[dict[str, Figure]]
    caption: str
    groups: list[int]


def sheets(results: Results) -> list[Sheet]:
    """Everything that a comparison says in figures: the rows, and tasks, draws and tolerances where
    there are any.
    """
    found = [comparison(results)]
    found += [sheet(results) for sheet in (tasks, draws, reaches)]
    return [sheet for sheet in found if sheet.lines]


def comparison(results: Results) -> Sheet:
    """The rows beside each other."""
    rows = results.table
    if results.tolerance:  # what was searched for comes where it belongs
        rows = sorted(rows, key=lambda row: _order(row.pattern))
    columns = [*COLUMNS]
    columns += TASKS if any(row.tasks for row in rows) else ()
    columns += SPEED if any(row.latency for row in rows) else ()
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    return Sheet(
        _title(results),
        tuple(columns),
        [_cells(row) | _task_cells(row) | _speed_cells(row) for row in rows],
        _caption(results),
        [patterns.index(row.pattern) for row in rows],
    )


def _order(pattern: str) -> tuple[int, str, float]:
    """Where a pattern stands: the dense model, then shares family by family, then the rest as it
    came.
    """
    found = share_of(pattern)
    return (
        (0, "", 0.0)
        if pattern == "-"
        else (2, "", 0.0)
        if found is None
        else (1, found[1], found[0])
    )


def _cells(row: Row) -> dict[str, Figure]:
    dense = row.kind == "dense"
    low, high = row.delta_interval
    seconds = sum(row.seconds.values())
    return {
        "method": _same(method(row)),
        "pattern": _same(row.pattern),
        "kind": _same(row.kind),
        "sparsity": (f"{row.sparsity:.2%}", row.sparsity),
        "perplexity": (number(row.perplexity), row.perplexity),
        "difference [95 % interval]": _missing(dense)
        or (f"{row.delta:+.3g} [{low:.3g}, {high:.3g}]", row.delta),
        "rank": _missing(not row.rank) or (row.rank, float(row.rank.split(" ")[0].split("-")[0])),
        "KL": (f"{row.kl:.4f}", row.kl),
        "top-1": (f"{row.top1_agreement:.1%}", row.top1_agreement),
        "parameters": _missing(row.parameters is None)
        or (_parameters(row.parameters or 0), row.parameters or 0),
        "seconds": _missing(dense) or (f"{seconds:.1f}", seconds),
        "peak memory": _missing(row.peak_bytes is None) or _mebibytes(row.peak_bytes or 0, 0),
        "on disk": _mebibytes(row.disk_bytes, 1),
    }


def _speed_cells(row: Row) -> dict[str, Figure]:
    """The speed of one row in the runtime where it decodes fastest; nothing where it was not
    measured.
    """
    best = fastest(row)
    if best is None:
        return dict.fromkeys(SPEED, ("-", ""))
    return {
        "tokens/s": (f"{best['tokens_per_second']:.0f}", best["tokens_per_second"]),
        "runtime": _same(best["runtime"]),
        "over eager": (ratio(best["over_eager"]), best["over_eager"][0]),
        "over its dense": (ratio(best["decode_ratio"]), best["decode_ratio"][0]),
        "first token": (f"{best['prefill_ratio'][0]:.2f}", best["prefill_ratio"][0]),
    }


def fastest(row: Row) -> dict[str, Any] | None:
    """The measurement of the runtime in which a row decodes fastest."""
    decoded = [timing for timing in row.latency if "decode" in timing]
    return min(decoded, key=lambda timing: timing["decode"][1], default=None)


def _task_cells(row: Row) -> dict[str, Figure]:
    mean = row.tasks.get("mean")
    if mean is None:
        return dict.fromkeys(TASKS, ("-", ""))
    apart: Figure = ("-", "")
    if mean["delta"] is not None and row.kind != "dense":
        apart = points(mean["delta"], mean["delta_interval"]), mean["delta"]
    return {"tasks": (accuracy(mean), mean["accuracy"]), "difference on tasks": apart}


def tasks(results: Results) -> Sheet:
    """Accuracy on every task, with its difference to the dense model."""
    rows = [row for row in results.table if row.tasks]
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    lines: list[dict[str, Figure]] = []
    for row in rows:
        line = {
            column: _same(text)
            for column, text in zip(FIRST, (method(row), row.pattern, row.kind), strict=True)
        }
        for name in names:
            found = row.tasks.get(name)
            if found is None:
                line[name] = ("-", "")
            elif row.kind == "dense" or found["delta"] is None:
                line[name] = (accuracy(found), found["accuracy"])
            else:
                line[name] = (
                    f"{accuracy(found)}, {points(found['delta'], found['delta_interval'])}",
                    found["delta"],
                )
        lines.append(line)
    count = {
        name: found["items"]
        for row in rows
        for name, found in row.tasks.items()
        if "items" in found
    }
    caption = (
        "Zero-shot accuracy ± standard error by lm-eval, and the difference to dense in points [95 % interval, paired "
        f"bootstrap over items]. Items: {', '.join(f'{name} {items}' for name, items in count.items())}. In the mean "
        "each task weighs the same."
    )
    return Sheet("Tasks", (*FIRST, *names), lines, caption, [0] * len(lines))


def draws(results: Results) -> Sheet:
    """How much perplexity hangs on the draw of calibration text: for each method, text and size
    over the seeds.
    """
    found: dict[tuple[str, str, str, str, int], list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.calibration is not None and not row.searched and row.values == "as stored":
            draw = results.calibrations[row.calibration]
            found[method(row), row.pattern, row.kind, draw["source"], draw["samples"]].append(row)
    lines: list[dict[str, Figure]] = []
    rows, texts = [key[:3] for key in found], [draw["source"] for draw in results.calibrations]
    drawn = [key for key, held in found.items() if rows.count(key[:3]) > 1 or len(held) > 1]
    order = sorted(drawn, key=lambda key: (rows.index(key[:3]), texts.index(key[3]), key[4]))
    for key in order:
        values = [row.perplexity for row in found[key]]
        mean = sum(values) / len(values)
        lines.append(
            {
                **{column: _same(text) for column, text in zip(FIRST, key[:3], strict=True)},
                "text": _same(Path(key[3]).name),
                "samples": (str(key[4]), key[4]),
                "seeds": (str(len(values)), len(values)),
                "perplexity": (number(mean), mean),
                "lowest to highest": (
                    f"{number(min(values))} to {number(max(values))}",
                    max(values) - min(values),
                ),
            }
        )
    caption = (
        "The same method on other draws of calibration text: mean over the seeds, and the lowest "
        "and highest of them."
    )
    return Sheet(
        "How much hangs on the calibration text",
        (*FIRST, "text", "samples", "seeds", "perplexity", "lowest to highest"),
        lines,
        caption,
        [rows.index(key[:3]) for key in order],
    )


def reaches(results: Results) -> Sheet:
    """How far each method goes within the tolerance."""
    lines: list[dict[str, Figure]] = []
    share = results.tolerance.get("share", 0.0)
    for reach in results.tolerance.get("found", ()):
        name = (
            reach["method"]
            if reach["allocation"] == "uniform"
            else f"{reach['method']} by {reach['allocation']}"
        )
        pattern, perplexity = reach["pattern"], reach["perplexity"]
        lines.append(
            {
                "method": _same(name),
                "up to": _missing(pattern is None) or (pattern, (share_of(pattern) or (0.0,))[0]),
                "perplexity": _missing(perplexity is None) or (number(perplexity), perplexity),
                "interval within": _same("yes" if reach["certain"] else "no"),
                "too much": _same(
                    (reach["beyond"] or "-") + (", refused" if reach["note"] else "")
                ),
            }
        )
    most = next((reach["most"] for reach in results.tolerance.get("found", ())), 0.0)
    caption = (
        f"The largest whole percent before the first whose perplexity is above {number(most)}, found by bisection; "
        "whether the upper end of its 95 % interval is within as well; and the percent that is too much."
    )
    return Sheet(
        f"How far each method goes at {100 * share:.3g} % more perplexity",
        ("method", "up to", "perplexity", "interval within", "too much"),
        lines,
        caption,
        [0] * len(lines),
    )


def conditions(results: Results) -> list[tuple[str, str]]:
    """Under what all of it was measured: what, and how."""
    judged = results.evaluation
    trained = {
        row.recovered.text["sha256"]: row.recovered.text for row in results.table if row.recovered
    }
    return [
        ("model", f"{results.model['name']}, {results.model['parameters']:,} parameters"),
        *(
            ("calibration", f"{_text(draw)}, seed {draw['seed']}, sha256 {draw['sha256'][:16]}…")
            for draw in results.calibrations
        ),
        *(
            ("recovery", f"{_text(text)}, seed {text['seed']}, sha256 {text['sha256'][:16]}…")
            for text in trained.values()
        ),
        (
            "evaluation",
            f"{judged['source']} ({judged['split']}), {judged['samples']} windows of {judged['length']} "
            f"tokens, sha256 {judged['sha256'][:16]}…",
        ),
        (
            "run",
            ", ".join(f"{key} {value}" for key, value in results.options.items() if value != []),
        ),
        ("machine", ", ".join(f"{key} {value}" for key, value in results.machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in results.versions.items())),
        ("command", " ".join(results.command)),
        *(("left out", f"{what}: {why}") for what, why in results.not_timed.items()),
    ]


def _text(draw: dict[str, Any]) -> str:
    return (
        f"{draw['source']} ({draw['split']}), {draw['samples']} samples of {draw['length']} tokens"
    )


def _title(results: Results) -> str:
    """What was measured and on how much; a table never stands without its calibration size."""
    judged, calibrated = results.evaluation, results.calibrations[0]
    return (
        f"{Path(results.model['name']).name}: perplexity on {judged['samples']} windows of {judged['length']} tokens "
        f"({Path(judged['source']).name}), calibrated on {calibrated['samples']} × {calibrated['length']} tokens "
        f"({Path(calibrated['source']).name})"
    )


def _caption(results: Results) -> str:
    free = sorted(
        {
            method(row)
            for row in results.table
            if row.calibration is None and row.kind != "dense" and not row.recovered
        }
    )
    alone = f" {', '.join(free)}: needs no calibration text." if free else ""
    if any(row.recovered for row in results.table):
        alone += (
            " What was fine-tuned after pruning, its zeros kept, says so with the tokens and seconds spent; it is "
            "ranked among rows that saw the same text, and its seconds include the training."
        )
    return (
        "Sparsity: share of zeros in the pruned matrices; of a structured row, share of the block weights that are "
        "gone, so the model is smaller. Difference: perplexity minus dense, paired bootstrap over "
        "windows. Rank: by perplexity within one pattern; rows whose paired difference may be zero are a tie. "
        "KL: dense against pruned, nats a token. Seconds: planning, forward passes, statistics, solving and refining; "
        f"not loading, writing and evaluating.{alone} " + _said_of_speed(results)
    )


def _said_of_speed(results: Results) -> str:
    """What the figures for speed are; that there are none, where there are none."""
    timing = next((timing for row in results.rows if (timing := fastest(row))), None)
    if timing is None:
        return "No speed was measured here, and zeros alone give none."
    return (
        f"Speed: decoding in the runtime where the row is fastest, {timing['dtype']}, batch {timing['batch']}, prompt "
        f"{timing['prompt']}, {timing['new_tokens']} tokens, {results.machine['threads']} threads of "
        f"{results.machine['processor']}. Over eager: times as fast as the dense model in plain transformers; over its "
        "dense: in the same runtime or our own dense product, first token likewise; medians of paired rounds "
        "[95 % interval]. results.json has every runtime."
    )


def method(row: Row) -> str:
    """The method of a row with what else it has for itself."""
    rule = "" if row.allocation == "uniform" else f" by {row.allocation}"
    rounded = "" if row.values == "as stored" else f", {row.values}"
    return f"{row.method}{rule}{rounded}" + (f", {_spent(row.recovered)}" if row.recovered else "")


def _spent(recovered: Recovered) -> str:
    """By which way a row was recovered, and what that took: a row that was trained is never shown
    without.
    """
    tokens = recovered.tokens
    count = f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"
    return f"{recovered.way} {count} tokens {recovered.seconds:.0f} s"


def accuracy(found: dict[str, Any]) -> str:
    error = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.1f}"
    return f"{found['accuracy']:.1%}{error}"


def points(delta: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * delta:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def ratio(found: Sequence[float]) -> str:
    """A ratio with its interval."""
    middle, low, high = found
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def number(value: float) -> str:
    """Two decimals where they say something, else four digits."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def _same(text: str) -> Figure:
    return text, text


def _missing(absent: bool) -> Figure | None:
    return ("-", "") if absent else None


def _mebibytes(count: int, digits: int) -> Figure:
    return in_words(count, ("MiB",), f".{digits}f"), count


def _parameters(count: int) -> str:
    """A number of parameters in three digits, as papers give it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
