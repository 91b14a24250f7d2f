"""What a comparison says, as sheets of text: the same for a terminal, Markdown and a browser.

Columns for speed appear where it was measured, each figure with its runtime, and there is none
otherwise; so do those for tasks. No sheet stands without its calibration size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.bos import reading_in_words
from secateur.data.windows import parts_in_words
from secateur.evaluation.results.ranking import BAND
from secateur.evaluation.results.schema import Recovered, Results, Row
from secateur.methods.pattern_text import share_of
from secateur.methods.values import AS_STORED

FIRST = ("method", "pattern", "kind")
"""The columns that name a row; whatever is left out, these stand."""
SPEED = ("tokens/s", "runtime", "over eager", "over its dense", "first token")
TASKS = ("tasks", "difference on tasks")
Figure = tuple[str, float | str]
"""What is shown, and what it is sorted by."""


@dataclass(frozen=True)
class Sheet:
    """A table with a title and a caption. Lines have the names of all columns; `groups` numbers
    those that belong together.
    """

    title: str
    lines: list[dict[str, Figure]]
    caption: str
    groups: list[int]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.lines[0])


def sheets(results: Results) -> list[Sheet]:
    """All that a comparison says in figures: rows; tasks, draws, tolerances where there are any."""
    every = (comparison(results), tasks(results), draws(results), tolerances(results))
    return [sheet for sheet in every if sheet.lines]


def comparison(results: Results) -> Sheet:
    """The rows beside each other."""
    rows = results.table
    if results.tolerance:  # what was searched for comes where it belongs
        rows = sorted(rows, key=lambda row: _order(row.pattern))
    answered, timed = any(row.tasks for row in rows), any(row.latency for row in rows)
    sized = any(row.values != AS_STORED for row in rows)
    lines = [
        (_sized(row) if sized else _cells(row))
        | (_task_cells(row) if answered else {})
        | (_speed_cells(row) if timed else {})
        for row in rows
    ]
    spare = ("bits a byte", "accepted", *(["rank"] if sized else []))
    empty = [name for name in spare if all(line[name][1] == "" for line in lines)]
    lines = [{k: cell for k, cell in line.items() if k not in empty} for line in lines]
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    groups = [patterns.index(row.pattern) for row in rows]
    return Sheet(_title(results), lines, _caption(results), groups)


def _order(pattern: str) -> tuple[int, str, float]:
    """Where a pattern stands: the dense model, shares family by family, the rest as it came."""
    if pattern == "-":
        return 0, "", 0.0
    share = share_of(pattern)
    return (1, share[1], share[0]) if share else (2, "", 0.0)


def _cells(row: Row) -> dict[str, Figure]:
    low, high = row.delta_interval
    delta = None if row.kind == "dense" else row.delta
    seconds = None if row.kind == "dense" else row.took
    return {
        **_names(method(row), row.pattern, row.kind),
        "sparsity": _figure(row.sparsity, "{:.2%}"),
        "perplexity": (number(row.perplexity), row.perplexity),
        "bits a byte": _figure(row.bits_per_byte, "{:.4f}"),
        "difference [95 % interval]": _figure(delta, f"{{:+.3g}} [{low:.3g}, {high:.3g}]"),
        "rank": _place(row.rank),
        "KL": _figure(row.kl, "{:.4f}"),
        "top-1": _figure(row.top1_agreement, "{:.1%}"),
        "accepted": _figure(row.acceptance, "{:.1%}"),
        "parameters": _figure(row.parameters, _parameters(row.parameters or 0)),
        "seconds": _figure(seconds, "{:.1f}"),
        "peak memory": _figure(row.peak_bytes, f"{(row.peak_bytes or 0) / 2**20:.0f} MiB"),
        "on disk": _figure(row.disk_bytes, f"{row.disk_bytes / 2**20:.1f} MiB"),
    }


def _sized(row: Row) -> dict[str, Figure]:
    """The cells of a row behind what it takes: how good it is, is told at equal bytes."""
    cells = _cells(row)
    size = {
        "bits a weight": _figure(row.bits, "{:.2f}"),
        "on disk": cells["on disk"],
        "rank at equal bytes": _place(row.byte_rank),
    }
    names = {name: cells[name] for name in FIRST}
    return {**names, **size, **cells, "stored as": _text(row.stored_as or "-")}


def _place(rank: str) -> Figure:
    """A rank, sorted by the best place that it may be."""
    best = float(rank.split(" ")[0].split("-")[0]) if rank else None
    return _figure(best, rank)


def _names(*texts: str) -> dict[str, Figure]:
    """What a row is called: its method, pattern and kind."""
    return dict(zip(FIRST, map(_text, texts), strict=True))


def _speed_cells(row: Row) -> dict[str, Figure]:
    """The speed of one row in the runtime where it decodes fastest; dashes where it has none."""
    best = fastest(row)
    if best is None:
        return dict.fromkeys(SPEED, ("-", ""))
    return {
        "tokens/s": _figure(best["tokens_per_second"], "{:.0f}"),
        "runtime": _text(best["runtime"]),
        "over eager": (ratio(best["over_eager"]), best["over_eager"][0]),
        "over its dense": (ratio(best["decode_ratio"]), best["decode_ratio"][0]),
        "first token": _figure(best["prefill_ratio"][0], "{:.2f}"),
    }


def fastest(row: Row) -> dict[str, Any] | None:
    """The measurement of the runtime in which a row decodes fastest."""
    decoded = [timing for timing in row.latency if "decode" in timing]
    return min(decoded, key=lambda timing: timing["decode"][1], default=None)


def _task_cells(row: Row) -> dict[str, Figure]:
    mean = row.tasks.get("mean")
    if mean is None:
        return dict.fromkeys(TASKS, ("-", ""))
    delta = None if row.kind == "dense" else mean["delta"]
    return {
        "tasks": (accuracy(mean), mean["accuracy"]),
        "difference on tasks": ("-", "") if delta is None else (points(mean), delta),
    }


def tasks(results: Results) -> Sheet:
    """Accuracy on every task, with its difference to the dense model."""
    rows = [row for row in results.table if row.tasks]
    names = list(dict.fromkeys(name for row in rows for name in row.tasks))
    items = {
        name: f"{name} {answers['items']}"
        for row in rows
        for name, answers in row.tasks.items()
        if "items" in answers
    }
    caption = (
        "Zero-shot accuracy ± standard error by lm-eval, and the difference to dense in points "
        f"[95 % interval, paired bootstrap over items]. Items: {', '.join(items.values())}. In the "
        "mean each task weighs the same."
    )
    lines = [
        _names(method(row), row.pattern, row.kind)
        | {name: _answered(row.tasks.get(name), row.kind) for name in names}
        for row in rows
    ]
    return Sheet("Tasks", lines, caption, [0] * len(lines))


def _answered(answers: dict[str, Any] | None, kind: str) -> Figure:
    if answers is None:
        return "-", ""
    if kind == "dense" or answers["delta"] is None:
        return accuracy(answers), answers["accuracy"]
    return f"{accuracy(answers)}, {points(answers)}", answers["delta"]


def draws(results: Results) -> Sheet:
    """How much hangs on the calibration text: by method, text and size, over the seeds."""
    drawn: dict[tuple[str, str, str, str, int], list[float]] = defaultdict(list)
    for row in results.rows:
        if row.calibration is not None and not row.searched and row.values == AS_STORED:
            text = results.calibrations[row.calibration]
            key = method(row), row.pattern, row.kind, text["source"], text["samples"]
            drawn[key].append(row.perplexity)
    rows, texts = [key[:3] for key in drawn], [text["source"] for text in results.calibrations]
    names = {text["source"]: text_name(text) for text in results.calibrations}
    order = sorted(
        (key for key, values in drawn.items() if rows.count(key[:3]) > 1 or len(values) > 1),
        key=lambda key: (rows.index(key[:3]), texts.index(key[3]), key[4]),
    )
    lines: list[dict[str, Figure]] = []
    for key in order:
        values = drawn[key]
        low, high, mean = min(values), max(values), sum(values) / len(values)
        lines.append(
            {
                **_names(*key[:3]),
                "text": _text(names[key[3]]),
                "samples": _figure(key[4], "{}"),
                "seeds": _figure(len(values), "{}"),
                "perplexity": (number(mean), mean),
                "lowest to highest": (f"{number(low)} to {number(high)}", high - low),
            }
        )
    return Sheet(
        "How much hangs on the calibration text",
        lines,
        "The same method on other draws of calibration text: mean over the seeds, and the lowest "
        "and highest of them.",
        [rows.index(key[:3]) for key in order],
    )


def tolerances(results: Results) -> Sheet:
    """How far each method goes within the tolerance."""
    reached = results.tolerance.get("found", [])
    lines: list[dict[str, Figure]] = []
    for reach in reached:
        rule = "" if reach["allocation"] == "uniform" else f" by {reach['allocation']}"
        pattern, perplexity = reach["pattern"], reach["perplexity"]
        beyond = (reach["beyond"] or "-") + (", refused" if reach["note"] else "")
        lines.append(
            {
                "method": _text(f"{reach['method']}{rule}"),
                "up to": (pattern, (share_of(pattern) or (0.0,))[0]) if pattern else ("-", ""),
                "perplexity": _figure(perplexity, number(perplexity or 0.0)),
                "interval within": _text("yes" if reach["certain"] else "no"),
                "too much": _text(beyond),
            }
        )
    most = number(reached[0]["most"] if reached else 0.0)
    return Sheet(
        f"How far each method goes at {100 * results.tolerance.get('share', 0.0):.3g} % more "
        "perplexity",
        lines,
        f"The largest whole percent before the first whose perplexity is above {most}, found by "
        "bisection; whether the upper end of its 95 % interval is within as well; and the percent "
        "that is too much.",
        [0] * len(lines),
    )


def conditions(results: Results) -> list[tuple[str, str]]:
    """Under what all of it was measured: what, and how."""
    trained = {
        row.recovered.text["sha256"]: row.recovered.text for row in results.table if row.recovered
    }
    run = {key: value for key, value in results.options.items() if value != []}
    return [
        ("model", f"{results.model['name']}, {results.model['parameters']:,} parameters"),
        *(("calibration", _source(draw, "samples")) for draw in results.calibrations),
        *(("recovery", _source(text, "samples")) for text in trained.values()),
        ("evaluation", _source(results.evaluation, "windows")),
        ("run", _pairs(run)),
        ("machine", _pairs(results.machine)),
        ("versions", _pairs(results.versions)),
        ("command", " ".join(results.command)),
        *(("note", note) for note in results.notes),
        *(("left out", f"{what}: {why}") for what, why in results.not_timed.items()),
    ]


def _source(text: dict[str, Any], what: str) -> str:
    size = f"{text['samples']} {what} of {text['length']} tokens"
    seed = f", seed {text['seed']}" if what == "samples" else ""
    if parts := parts_in_words(text):
        seed = f"{seed} ({parts})"
    if drawn := text.get("drawn"):
        seed = f"{seed}, drawn {drawn}"
    return (
        f"{text['source']} ({text['split']}), {size}{seed}, {reading_in_words(text)}, sha256 "
        f"{text['sha256'][:16]}…"
    )


def text_name(text: Mapping[str, Any]) -> str:
    """What a text is called in titles: a file without its folders, the parts of a mixture."""
    names = [Path(part["source"]).name for part in text.get("parts", ())]
    return f"a mixture of {', '.join(names)}" if names else Path(text["source"]).name


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _title(results: Results) -> str:
    """What was measured and on how much; a table never stands without its calibration size."""
    judged, calibrated = results.evaluation, results.calibrations[0]
    return (
        f"{Path(results.model['name']).name}: perplexity on {judged['samples']} windows of "
        f"{judged['length']} tokens ({text_name(judged)}), calibrated on "
        f"{calibrated['samples']} × {calibrated['length']} tokens "
        f"({text_name(calibrated)})"
    )


def _caption(results: Results) -> str:
    free = [row for row in results.pruned if row.calibration is None and not row.recovered]
    names = sorted({method(row) for row in free})
    alone = f" {', '.join(names)}: needs no calibration text." if names else ""
    if any(row.recovered for row in results.table):
        alone += (
            " What was fine-tuned after pruning, its zeros kept, says so with the tokens and "
            "seconds spent; it is ranked among rows that saw the same text, and its seconds "
            "include the training."
        )
    return (
        "Sparsity: share of zeros in the pruned matrices; of a structured row, share of the block "
        "weights that are gone, so the model is smaller. Difference: perplexity minus dense, "
        "paired bootstrap over windows. Rank: by perplexity within one pattern; rows whose paired "
        "difference may be zero are a tie. KL: dense against pruned, nats a token. Seconds: "
        "planning, forward passes, statistics, solving and refining; not loading, writing and "
        f"evaluating.{alone}{_size_caption(results)} {_speed_caption(results)}"
    )


def _size_caption(results: Results) -> str:
    """What the figures for size are, where there are some."""
    if all(row.values == AS_STORED for row in results.rows):
        return ""
    return (
        " Values on a grid: bits for each weight of the matrices in blocks, and bytes on disk, are "
        "of the smallest format that is written of the row, masks and scales included. Rank at "
        f"equal bytes: among the rows on a grid within {BAND:.0%} of its bytes, whatever the "
        "pattern."
    )


def _speed_caption(results: Results) -> str:
    """What the figures for speed are; that there are none, where there are none."""
    timing = next((timing for row in results.rows if (timing := fastest(row))), None)
    if timing is None:
        return "No speed was measured here, and zeros alone give none."
    return (
        f"Speed: decoding in the runtime where the row is fastest, {timing['dtype']}, batch "
        f"{timing['batch']}, prompt {timing['prompt']}, {timing['new_tokens']} tokens, "
        f"{results.machine['threads']} threads of {results.machine['processor']}. Over eager: "
        "times as fast as the dense model in plain transformers; over its dense: in the same "
        "runtime or our own dense product, first token likewise; medians of paired rounds "
        "[95 % interval]. results.json has every runtime."
    )


def method(row: Row) -> str:
    """The method of a row with what else it has for itself."""
    rule = "" if row.allocation == "uniform" else f" by {row.allocation}"
    rounded = "" if row.values == AS_STORED else f", {row.values}"
    return f"{row.method}{rule}{rounded}" + (f", {_spent(row.recovered)}" if row.recovered else "")


def _spent(recovered: Recovered) -> str:
    """In which way a row was recovered, and what that took: no trained row is shown without."""
    tokens = recovered.tokens
    count = f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"
    return f"{recovered.way} {count} tokens {recovered.seconds:.0f} s"


def accuracy(answers: dict[str, Any]) -> str:
    error = "" if answers["stderr"] is None else f" ± {100 * answers['stderr']:.1f}"
    return f"{answers['accuracy']:.1%}{error}"


def points(answers: dict[str, Any]) -> str:
    """The difference from dense in points, with its interval."""
    low, high = answers["delta_interval"]
    return f"{100 * answers['delta']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def ratio(interval: Sequence[float]) -> str:
    """A ratio with its interval, which stands behind it."""
    middle, low, high = interval
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def number(value: float) -> str:
    """Two decimals where they say something, else four digits."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def _text(text: str) -> Figure:
    return text, text


def _figure(value: float | None, form: str) -> Figure:
    """A number as `form` shows it, or a dash where there is none."""
    return ("-", "") if value is None else (form.format(value), value)


def _parameters(count: int) -> str:
    """A number of parameters in three digits, as papers give it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
