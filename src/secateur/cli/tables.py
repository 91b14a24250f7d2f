"""What a run did, what checkpoints hold, what was timed, what runtimes and machines do: for a
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from secateur.checkpoints.record import LEFT_OUT
from secateur.deployment.inspect import rows
from secateur.deployment.validate import rows as validation_rows
from secateur.errors import printable
from secateur.evaluation.report.tables import ratio
from secateur.evaluation.tasks.answer import lines as task_lines
from secateur.system.sizes import in_words

if TYPE_CHECKING:
    from secateur.checkpoints.record import Report
    from secateur.deployment.bench import BenchResults
    from secateur.deployment.bench_matrices import LayerTiming
    from secateur.deployment.doctor import Examination
    from secateur.deployment.inspect import Inspection
    from secateur.deployment.validate import Validation
    from secateur.evaluation.perplexity import Evaluation


def summary(report: Report) -> list[str]:
    """What a run of `prune` did, in a few lines."""
    if report.parameters:
        before, after = report.parameters
        gone = "; ".join(
            f"blocks {what}" if where == "blocks" else f"{what} of {where}"
            for where, what in report.removed.items()
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
    errors = {
        site.site: site.output_error for site in report.sites if site.output_error is not None
    }
    if errors:
        worst = max(errors, key=lambda site: errors[site])
        mean = sum(errors.values()) / len(errors)
        lines.append(
            f"Relative output error: mean {mean:.4f}, most at {worst} ({errors[worst]:.4f})."
        )
    lines += [report.note] if report.note else []
    lines += [
        f"{site.site}: {site.note}" for site in report.sites if site.note and site.note != LEFT_OUT
    ]
    seconds = report.seconds
    lines.append(
        f"{seconds.total:.1f} s: {seconds.plan:.1f} planning, {seconds.forward:.1f} forward, "
        f"{seconds.statistics:.1f} statistics, {seconds.solve:.1f} solving, {seconds.refine:.1f} refining. "
        f"Written to {report.out}."
    )
    return lines


def evaluation_lines(found: Evaluation) -> Iterator[str]:
    """What was measured of a model, and its distance from the dense one where that was asked
    for.
    """
    text = found.evaluation
    yield (
        f"Perplexity {found.perplexity:.4f} on {text['source']} ({text['split']}), {text['samples']} windows "
        f"of {text['length']} tokens."
    )
    if found.delta is not None and found.delta_interval is not None:
        low, high = found.delta_interval
        yield (
            f"Dense {found.dense_perplexity:.4f}, difference {found.delta:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}), KL {found.kl:.4f} nats, "
            f"the same top token {found.top1_agreement:.1%} of the time."
        )
    yield from task_lines(found.tasks or {})


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
    coverage = (
        "unknown (architecture not known here)"
        if found.coverage is None
        else f"{found.coverage:.1%}"
    )
    lines = [
        f"Sparsity {found.sparsity:.2%} over {len(found.tensors)} tensors; coverage {coverage}."
    ]
    if record := found.record:
        lines.append(f"Pruned with {record.get('method')} to {record.get('pattern')}.")
        if record.get("parameters"):
            before, after = record["parameters"]
            gone = "; ".join(
                f"{where}: {what}" for where, what in (record.get("removed") or {}).items()
            )
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
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = (
        "model",
        "runtime",
        "batch",
        "prompt",
        "first token",
        "ratio",
        "a token",
        "tokens/s",
        "ratio",
        "dense in",
        "over eager",
        "memory",
        "weights",
        "read",
        "products",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in results.timings:
        memory = "-" if row.memory_bytes is None else in_words(row.memory_bytes, ("MiB",), ".0f")
        shown.add_row(
            escape(row.model),
            row.runtime,
            str(row.batch),
            str(row.prompt),
            f"{1e3 * row.prefill[1]:.1f} ms",
            _interval(row.prefill_ratio),
            f"{1e3 * row.decode[1]:.2f} ms",
            f"{row.tokens_per_second:.1f}",
            _interval(row.decode_ratio),
            row.against,
            _interval(row.over_eager),
            memory,
            in_words(row.weight_bytes, ("MiB",), ".0f"),
            f"{row.share_of_bandwidth:.0%}",
            f"{row.share_of_matrix_rate:.0%}",
        )
    return shown


def layer_table(timings: Sequence[LayerTiming]) -> Table:
    """Single matrices: times, and ratios to torch and to our own dense kernel."""
    shown = Table(
        caption="Times: median over rounds. Ratios: how many times faster than torch and our own dense kernel with "
        "the same values. Bytes: how many times less is read than by torch.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = (
        "matrix",
        "shape",
        "zeros",
        "batch",
        "kernel",
        "time",
        "bytes",
        "over torch",
        "over own dense",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("matrix", "kernel") else "right")
    for row in timings:
        own = next((ratio for name, ratio in row.over.items() if name != "torch"), None)
        shown.add_row(
            escape(row.site),
            "×".join(map(str, row.shape)),
            f"{row.sparsity:.0%}",
            str(row.batch),
            row.kernel,
            f"{1e3 * row.seconds[1]:.3f} ms",
            f"{row.bytes:.2f}",
            f"{row.over['torch']:.2f}",
            "-" if own is None else f"{own:.2f}",
        )
    return shown


def validation_table(found: Validation) -> Table:
    """What a runtime does with each tensor."""
    shown = Table(
        title=escape(f"{found.folder} in {found.runtime}"), box=SIMPLE_HEAD, pad_edge=False
    )
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
        f"{held['processor']}, {held['cores']} cores, "
        f"{in_words(held['memory_bytes'], ('GiB',), '.0f')}, {held['system']}",
        ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        f"packed products: {packed}",
        f"accelerator: {found.cuda or 'none that torch can use'}",
    ]
    if found.cuda:
        lines.append(f"cuSPARSELt: {found.cusparselt or 'not in this build of torch'}")
    lines += [
        f"runtime {name}: {'yes' if why is None else f'no, {why}'}"
        for name, why in found.runtimes.items()
    ]
    lines += [f"format {name}: loaded by {what}" for name, what in found.formats.items()]
    missing = [name for name, version in found.packages.items() if version is None]
    there = [f"{name} {version}" for name, version in found.packages.items() if version is not None]
    return [
        *lines,
        f"optional packages: {', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}",
    ]


def _interval(found: tuple[float, float, float]) -> str:
    return ratio(found).replace("[", "\\[")
