"""Results as people read them: a table on the terminal and a Markdown page.

Columns for speed appear where it was measured, each figure with its runtime; there is none otherwise.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from secateur.bench import BenchResults
from secateur.doctor import Examination
from secateur.errors import printable
from secateur.inspection import Inspection, rows
from secateur.layers import LayerTiming
from secateur.record import LEFT_OUT, Report
from secateur.results import Results, Row
from secateur.validate import Validation
from secateur.validate import rows as validation_rows

COLUMNS = (
    "method", "pattern", "kind", "sparsity", "perplexity", "difference [95 % interval]", "rank", "KL",
    "top-1", "parameters", "seconds", "peak memory", "on disk",
)  # fmt: skip
SPEED = ("tokens/s", "runtime", "over eager", "over its dense", "first token")
"""The columns that a comparison with `--bench` has besides."""
NARROW = ("method", "pattern", "kind", "perplexity", "difference [95 % interval]", "rank")
"""The columns that fit a terminal of 80 characters."""
WIDE_CHARACTERS = 150


def summary(report: Report) -> list[str]:
    """What a run of `prune` did, in a few lines."""
    if report.parameters:
        before, after = report.parameters
        gone = "; ".join(
            f"blocks {what}" if where == "blocks" else f"{what} of {where}" for where, what in report.removed.items()
        )
        lines = [
            f"{report.method}, {report.pattern}: {before:,} parameters became {after:,} ({after / before:.1%}).",
            f"Gone: {gone}.",
        ]
    else:
        lines = [
            f"{report.method} {report.pattern}: {report.sparsity:.2%} of the weights of {len(report.sites)} sites are "
            f"zero (coverage {report.coverage:.1%} of the block weights)."
        ]
    errors = {site.site: site.output_error for site in report.sites if site.output_error is not None}
    if errors:
        worst = max(errors, key=lambda site: errors[site])
        mean = sum(errors.values()) / len(errors)
        lines.append(f"Relative output error: mean {mean:.4f}, most at {worst} ({errors[worst]:.4f}).")
    lines += [f"{site.site}: {site.note}" for site in report.sites if site.note and site.note != LEFT_OUT]
    seconds = report.seconds
    lines.append(
        f"{seconds.total:.1f} s: {seconds.plan:.1f} planning, {seconds.forward:.1f} forward, "
        f"{seconds.statistics:.1f} statistics, {seconds.solve:.1f} solving, {seconds.refine:.1f} refining. "
        f"Written to {report.out}."
    )
    return lines


def cells(row: Row) -> dict[str, str]:
    """One row of the table, by column."""
    dense = row.kind == "dense"
    low, high = row.delta_interval
    values = [
        (row.method if row.allocation == "uniform" else f"{row.method} by {row.allocation}")
        + ("" if row.values == "as stored" else f", {row.values}"),
        row.pattern,
        row.kind,
        f"{row.sparsity:.2%}",
        _number(row.perplexity),
        "-" if dense else f"{row.delta:+.3g} [{low:.3g}, {high:.3g}]",
        row.rank or "-",
        f"{row.kl:.4f}",
        f"{row.top1_agreement:.1%}",
        "-" if row.parameters is None else _parameters(row.parameters),
        "-" if dense else f"{sum(row.seconds.values()):.1f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
        f"{row.disk_bytes / 2**20:.1f} MiB",
    ]
    return dict(zip(COLUMNS, values, strict=True))


def speed_cells(row: Row) -> dict[str, str]:
    """The speed of one row in the runtime where it decodes fastest, by column."""
    if not row.latency:
        return dict.fromkeys(SPEED, "-")
    best = min(row.latency, key=lambda timing: timing["decode"][1])
    ratios = (_range(best["over_eager"]), _range(best["decode_ratio"]), f"{best['prefill_ratio'][0]:.2f}")
    return dict(zip(SPEED, (f"{best['tokens_per_second']:.0f}", best["runtime"], *ratios), strict=True))


def shown_columns(results: Results, columns: Sequence[str]) -> list[str]:
    """The columns with those for speed, where it was measured; then what is of less use goes, the page has all."""
    if not any(row.latency for row in results.rows):
        return list(columns)
    return [*(column for column in columns if column in (*NARROW, "sparsity", "on disk")), *SPEED]


def table(results: Results, characters: int) -> Table:
    """The comparison as a table for a terminal that wide; a narrow one gets `NARROW` alone."""
    columns = shown_columns(results, COLUMNS if characters >= WIDE_CHARACTERS else NARROW)
    shown = Table(
        title=escape(_title(results)), caption=_caption(results), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in columns:
        shown.add_column(escape(column), justify="left" if column in NARROW[:3] else "right")
    for before, row in zip([None, *results.rows], results.rows, strict=False):
        if before and before.pattern != row.pattern:
            shown.add_section()
        held = cells(row) | speed_cells(row)
        shown.add_row(*(escape(held[column]) for column in columns))
    return shown


def inspection_table(found: Inspection) -> Table:
    """What the tensors of a checkpoint hold."""
    shown = Table(title=escape(found.folder))
    for column in ("tensor", "shape", "dtype", "sparsity", "satisfies", "odd values"):
        shown.add_column(column, overflow="fold")
    for row in rows(found):
        shown.add_row(*map(escape, row))
    return shown


def inspection_summary(found: Inspection) -> list[str]:
    """What a checkpoint holds as a whole, and what it says of itself."""
    coverage = "unknown (architecture not known here)" if found.coverage is None else f"{found.coverage:.1%}"
    lines = [f"Sparsity {found.sparsity:.2%} over {len(found.tensors)} tensors; coverage {coverage}."]
    if record := found.record:
        lines.append(f"Pruned with {record.get('method')} to {record.get('pattern')}.")
        if record.get("parameters"):
            before, after = record["parameters"]
            gone = "; ".join(f"{where}: {what}" for where, what in (record.get("removed") or {}).items())
            lines.append(f"A smaller model: {before:,} parameters became {after:,}. Gone: {gone}.")
    return [printable(line) for line in lines]


def speed_table(results: BenchResults) -> Table:
    """Measured times and ratios to the dense model, each with its runtime."""
    shown = Table(
        title=f"{results.dtype} on {results.machine['processor']}, {results.machine['threads']} threads, "
        f"{results.new_tokens} tokens decoded, {results.rounds} rounds",
        caption="First token: prefill. Ratios: how many times faster than the dense model [95 % interval] in the same "
        "runtime or in the one that is named; decoding over eager: than the dense model in plain transformers. Memory: "
        "growth while loading and running once. Read: share of what this machine reads at best "
        f"({results.read_bandwidth / 1e9:.0f} GB/s) that decoding reads of the weights. Products: share of its matrix "
        f"rate ({results.matrix_rate / 1e9:.0f} Gflop/s) in prefill.",
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    columns = (
        "model", "runtime", "batch", "prompt", "first token", "ratio", "a token", "tokens/s", "ratio", "dense in",
        "over eager", "memory", "weights", "read", "products",
    )  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in results.timings:
        memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f} MiB"
        shown.add_row(
            escape(row.model), row.runtime, str(row.batch), str(row.prompt), f"{1e3 * row.prefill[1]:.1f} ms",
            _interval(row.prefill_ratio), f"{1e3 * row.decode[1]:.2f} ms", f"{row.tokens_per_second:.1f}",
            _interval(row.decode_ratio), row.against, _interval(row.over_eager), memory,
            f"{row.weight_bytes / 2**20:.0f} MiB", f"{row.share_of_bandwidth:.0%}", f"{row.share_of_matrix_rate:.0%}",
        )  # fmt: skip
    return shown


def layer_table(timings: Sequence[LayerTiming]) -> Table:
    """Single matrices: times, and ratios to torch and to our own dense kernel."""
    shown = Table(
        caption="Times: median over rounds. Ratios: how many times faster than torch and our own dense kernel with "
        "the same values. Bytes: how many times less is read than by torch.",
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    columns = ("matrix", "shape", "zeros", "batch", "kernel", "time", "bytes", "over torch", "over own dense")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("matrix", "kernel") else "right")
    for row in timings:
        own = next((ratio for name, ratio in row.over.items() if name != "torch"), None)
        shown.add_row(
            escape(row.site), "×".join(map(str, row.shape)), f"{row.sparsity:.0%}", str(row.batch), row.kernel,
            f"{1e3 * row.seconds[1]:.3f} ms", f"{row.bytes:.2f}", f"{row.over['torch']:.2f}",
            "-" if own is None else f"{own:.2f}",
        )  # fmt: skip
    return shown


def validation_table(found: Validation) -> Table:
    """What a runtime does with each tensor."""
    shown = Table(title=escape(f"{found.folder} in {found.runtime}"), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("tensor", "shape", "dtype", "sparsity", "promised", "used", "why"):
        shown.add_column(column, overflow="fold")
    for row in validation_rows(found):
        shown.add_row(*(escape(printable(cell)) for cell in row))
    return shown


def doctor_lines(found: Examination) -> list[str]:
    """What this machine can run, a line each."""
    held = found.machine
    packed = found.packed or "not compiled: install gcc or clang, then install the package again"
    lines = [
        f"{held['processor']}, {held['cores']} cores, {held['memory_bytes'] / 2**30:.0f} GiB, {held['system']}",
        ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        f"packed products: {packed}",
        f"accelerator: {found.cuda or 'none that torch can use'}",
    ]
    if found.cuda:
        lines.append(f"cuSPARSELt: {found.cusparselt or 'not in this build of torch'}")
    lines += [f"runtime {name}: {'yes' if why is None else f'no, {why}'}" for name, why in found.runtimes.items()]
    lines += [f"format {name}: loaded by {what}" for name, what in found.formats.items()]
    missing = [name for name, version in found.packages.items() if version is None]
    there = [f"{name} {version}" for name, version in found.packages.items() if version is not None]
    return [*lines, f"optional packages: {', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}"]


def _interval(ratio: tuple[float, float, float]) -> str:
    return _range(ratio).replace("[", "\\[")


def _range(ratio: Sequence[float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def markdown(results: Results) -> str:
    """The comparison as a Markdown page with its conditions."""
    calibration, evaluation = results.calibration, results.evaluation
    columns = [*COLUMNS, *(SPEED if any(row.latency for row in results.rows) else ())]
    held = [cells(row) | speed_cells(row) for row in results.rows]
    lines = [
        f"# {_escape(_title(results))}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_escape(row[column]) for column in columns) + " |" for row in held),
        "",
        _caption(results),
        "",
        "## Conditions",
        "",
        f"* model: {_escape(results.model['name'])}, {results.model['parameters']:,} parameters",
        f"* calibration: {_escape(calibration['source'])} ({calibration['split']}), {calibration['samples']} samples "
        f"of {calibration['length']} tokens, seed {calibration['seed']}, sha256 {calibration['sha256'][:16]}…",
        f"* evaluation: {_escape(evaluation['source'])} ({evaluation['split']}), {evaluation['samples']} windows of "
        f"{evaluation['length']} tokens, sha256 {evaluation['sha256'][:16]}…",
        "* machine: " + ", ".join(f"{key} {value}" for key, value in results.machine.items()),
        "* versions: " + ", ".join(f"{key} {value}" for key, value in results.versions.items()),
        f"* command: `{' '.join(results.command)}`",
    ]
    return "\n".join(lines) + "\n"


def write_report(results: Results, out: Path) -> None:
    """Write `report.md`."""
    (out / "report.md").write_text(markdown(results), encoding="utf-8")


def _title(results: Results) -> str:
    """What was measured and on how much; a table never stands without its calibration size."""
    judged, calibrated = results.evaluation, results.calibration
    return (
        f"{Path(results.model['name']).name}: perplexity on {judged['samples']} windows of {judged['length']} tokens "
        f"({Path(judged['source']).name}), calibrated on {calibrated['samples']} × {calibrated['length']} tokens "
        f"({Path(calibrated['source']).name})"
    )


def _number(value: float) -> str:
    """Two decimals where they say something, else four digits."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def _parameters(count: int) -> str:
    """A number of parameters in three digits, as papers give it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _caption(results: Results) -> str:
    return (
        "Sparsity: share of zeros in the pruned matrices; of a structured row, share of the block weights that are "
        "gone, so the model is smaller. Difference: perplexity minus dense, paired bootstrap over "
        "windows. Rank: by perplexity within one pattern; rows whose paired difference may be zero are a tie. "
        "KL: dense against pruned, nats a token. Seconds: planning, forward passes, statistics, solving and refining; "
        "not loading, writing and evaluating. " + _said_of_speed(results)
    )


def _said_of_speed(results: Results) -> str:
    """What the figures for speed are; that there are none, where there are none."""
    timing = next((timing for row in results.rows for timing in row.latency), None)
    if timing is None:
        return "No speed was measured here, and zeros alone give none."
    return (
        f"Speed: decoding in the runtime where the row is fastest, {timing['dtype']}, batch {timing['batch']}, prompt "
        f"{timing['prompt']}, {timing['new_tokens']} tokens, {results.machine['threads']} threads of "
        f"{results.machine['processor']}. Over eager: times as fast as the dense model in plain transformers; over its "
        "dense: in the same runtime or our own dense product, first token likewise; medians of paired rounds "
        "[95 % interval]. results.json has every runtime."
    )


def _escape(text: str) -> str:
    """Text from outside as Markdown shows it literally."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|" else c for c in text.replace("\n", " "))
