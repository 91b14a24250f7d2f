"""What commands show on a terminal: what a run did, what checkpoints hold, comparisons, times, what
runtimes and machines do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from secateur.checkpoints.record import LEFT_OUT
from secateur.data.bos import reading_in_words
from secateur.data.windows import parts_in_words
from secateur.deployment.inspect import rows as inspection_rows
from secateur.deployment.inspect import share_in_words, shares_in_words
from secateur.deployment.validate import rows as validation_rows
from secateur.errors import printable
from secateur.evaluation.report.tables import FIRST, SPEED, TASKS, Sheet, ratio, sheets
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
    from secateur.evaluation.results.schema import Results


WIDE_CHARACTERS = 150
NARROW = (*FIRST, "perplexity", "difference [95 % interval]", "rank")
"""The columns of a comparison that fit a terminal of 80 characters."""
WHOLE = ("pattern", "kind", "rank", "runtime", "perplexity", "tokens/s")
"""Columns that are never broken; intervals and long names of methods are."""


def table(
    columns: str | Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    figures: str | Collection[str] = (),
    whole: Collection[str] = (),
    groups: Sequence[int] = (),
) -> Table:
    """A table of text from anywhere.

    `figures` are the columns that are set to the right, `whole` those that are not broken; a rule
    stands between rows of two `groups`. Names may stand in one text, separated by commas.
    """
    names, right = (one.split(",") if isinstance(one, str) else one for one in (columns, figures))
    drawn = Table(
        title=escape(printable(title)) or None,
        caption=escape(printable(caption)) or None,
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=bool(figures),
    )
    overflow = "ellipsis" if whole else "fold"
    for name in names:
        justify = "right" if name in right else "left"
        drawn.add_column(escape(name), justify=justify, overflow=overflow, no_wrap=name in whole)
    for number, row in enumerate(rows):
        if number and groups and groups[number] != groups[number - 1]:
            drawn.add_section()
        drawn.add_row(*(escape(printable(cell)) for cell in row))
    return drawn


def comparison_tables(results: Results, characters: int) -> Group:
    """A comparison for a terminal that wide; a narrow one gets the most important columns."""
    first, *others = sheets(results)
    more = [column for column in first.columns if column in (*SPEED, *TASKS)]
    if characters < WIDE_CHARACTERS:
        shown = [_sheet_table(first, NARROW)]
        for title, group in (("Tasks", TASKS), ("Speed", SPEED)):
            if group[0] in more and title not in {sheet.title for sheet in others}:
                lines = [line for line in first.lines if line[group[0]][0] != "-"]
                part = replace(first, title=title, caption="", lines=lines, groups=[])
                shown.append(_sheet_table(part, (*FIRST, *group)))
    else:
        narrow = (*NARROW, "sparsity", "on disk", *more)
        columns = [column for column in first.columns if column in narrow or not more]
        shown = [_sheet_table(first, columns)]
    return Group(*shown, *(_sheet_table(sheet, sheet.columns) for sheet in others))


def _sheet_table(sheet: Sheet, columns: Sequence[str]) -> Table:
    return table(
        columns,
        ([line[column][0] for column in columns] for line in sheet.lines),
        title=sheet.title,
        caption=sheet.caption,
        figures={*columns} - {*FIRST, "text"},
        whole=WHOLE,
        groups=sheet.groups,
    )


def summary(report: Report) -> Iterator[str]:
    """What a run of `prune` did, in a few lines."""
    if report.parameters:
        before, after = report.parameters
        removed = (
            f"blocks {what}" if where == "blocks" else f"{what} of {where}"
            for where, what in report.removed.items()
        )
        became = f"{before:,} parameters became {after:,} ({after / before:.1%})"
        yield f"{report.method}, {report.pattern}: {became}."
        yield f"Gone: {'; '.join(removed)}."
    else:
        rounded = "" if report.values == "as stored" else f", {report.values}"
        yield (
            f"{report.method} {report.pattern}{rounded}: {report.sparsity:.2%} of the weights of "
            f"{len(report.sites)} weight matrices are zero (coverage {report.coverage:.1%} of the "
            "block weights)."
        )
    text = report.calibration
    mixed = f" ({parts})" if (parts := parts_in_words(text)) else ""
    yield (
        f"Calibrated on {text['samples']} windows of {text['length']} tokens of {text['source']}"
        f"{mixed}, {reading_in_words(text)}."
    )
    matrices = report.sites
    errors = {one.site: one.output_error for one in matrices if one.output_error is not None}
    if errors:
        worst, mean = max(errors, key=lambda name: errors[name]), sum(errors.values()) / len(errors)
        yield f"Relative output error: mean {mean:.4f}, most at {worst} ({errors[worst]:.4f})."
    if report.distilled:
        before, after = report.distilled
        yield (
            "All blocks tuned together: KL to the dense model, on calibration windows held back, "
            f"{before:.4f} → {after:.4f} nats a token."
        )
    if report.note:
        yield report.note
    for matrix in matrices:
        if matrix.note and matrix.note != LEFT_OUT:
            yield f"{matrix.site}: {matrix.note}"
    seconds = report.seconds
    yield (
        f"{seconds.total:.1f} s: {seconds.plan:.1f} planning, {seconds.forward:.1f} forward, "
        f"{seconds.statistics:.1f} statistics, {seconds.solve:.1f} solving, "
        f"{seconds.refine:.1f} refining. Written to {report.out}."
    )


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """What was measured of a model, and its distance from the dense one where it was asked."""
    text = evaluation.evaluation
    yield (
        f"Perplexity {evaluation.perplexity:.4f}{_bits(evaluation.bits_per_byte)} on "
        f"{text['source']} ({text['split']}), {text['samples']} windows of {text['length']} "
        f"tokens, {reading_in_words(text)}."
    )
    if evaluation.delta is not None and evaluation.delta_interval is not None:
        low, high = evaluation.delta_interval
        yield (
            f"Dense {evaluation.dense_perplexity:.4f}{_bits(evaluation.dense_bits_per_byte)}, "
            f"difference {evaluation.delta:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}), KL {evaluation.kl:.4f} nats"
            f"{_within(evaluation.kl_interval)}, "
            f"the same top token {evaluation.top1_agreement:.1%} of the time, "
            f"{evaluation.acceptance:.1%} of what it drafts would be accepted."
        )
    yield from task_lines(evaluation.tasks or {})
    if evaluation.note:
        yield evaluation.note


def _bits(value: float | None) -> str:
    return "" if value is None else f" ({value:.4f} bits a byte)"


def _within(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def inspection_table(inspection: Inspection) -> Table:
    """What the tensors of a checkpoint hold."""
    columns = "tensor,shape,dtype,sparsity,satisfies,odd values"
    columns += ",came back,vanished" if inspection.against else ""
    return table(columns, inspection_rows(inspection), title=inspection.folder)


def inspection_summary(inspection: Inspection) -> Iterator[str]:
    """What a checkpoint holds as a whole, and what it says of itself."""
    known = inspection.coverage is not None
    coverage = f"{inspection.coverage:.1%}" if known else "unknown (architecture not known here)"
    over = f"over {len(inspection.tensors)} tensors; coverage {coverage}"
    if inspection.format:
        yield printable(f"Stored as {inspection.format}; zeros are counted in what is decoded.")
    yield f"Sparsity {share_in_words(inspection.sparsity)} {over}."
    if against := inspection.against:
        came_back, vanished = shares_in_words(against)
        yield (
            f"Of {against.pruned:,} pruned weights {against.came_back:,} came back ({came_back}); "
            f"of {against.kept:,} kept ones {against.vanished:,} became zero ({vanished})."
        )
        if unknown := sum(tensor.against is None for tensor in inspection.tensors):
            yield f"Zeros of {unknown} of {len(inspection.tensors)} tensors cannot be counted."
    for part in inspection.parts[1:]:
        share = share_in_words(part.sparsity)
        yield f"Besides: {part.name}, {part.numbers:,} numbers, sparsity {share}."
    if record := inspection.record:
        pruned = f"Pruned with {record.get('method')} to {record.get('pattern')}."
        yield printable(pruned)
        if record.get("parameters"):
            before, after = record["parameters"]
            removed = (record.get("removed") or {}).items()
            gone = "; ".join(f"{where}: {what}" for where, what in removed)
            became = f"A smaller model: {before:,} parameters became {after:,}."
            yield printable(f"{became} Gone: {gone}.")


def speed_table(results: BenchResults) -> Table:
    """Measured times and ratios to the dense model, each with its runtime."""
    machine = results.machine
    figures = (
        "batch,prompt,first token,ratio,a token,tokens/s,ratio,dense in,over eager,memory,weights,"
        "read,products"
    )
    rows = (
        (
            row.model,
            row.runtime,
            str(row.batch),
            str(row.prompt),
            f"{1e3 * row.prefill[1]:.1f} ms",
            ratio(row.prefill_ratio),
            f"{1e3 * row.decode[1]:.2f} ms",
            f"{row.tokens_per_second:.1f}",
            ratio(row.decode_ratio),
            row.against,
            ratio(row.over_eager),
            "-" if row.memory_bytes is None else in_words(row.memory_bytes, ("MiB",), ".0f"),
            in_words(row.weight_bytes, ("MiB",), ".0f"),
            f"{row.share_of_bandwidth:.0%}",
            f"{row.share_of_matrix_rate:.0%}",
        )
        for row in results.timings
    )
    return table(
        f"model,runtime,{figures}",
        rows,
        title=f"{results.dtype} on {machine['processor']}, {machine['threads']} threads, "
        f"{results.new_tokens} tokens decoded, {results.rounds} rounds",
        caption="First token: prefill. Ratios: how many times faster than the dense model [95 % "
        "interval] in the same runtime or in the one that is named; decoding over eager: than the "
        "dense model in plain transformers. Memory: growth while loading and running once. Read: "
        "share of what this machine reads at best "
        f"({results.read_bandwidth / 1e9:.0f} GB/s) that decoding reads of the weights. Products: "
        f"share of its matrix rate ({results.matrix_rate / 1e9:.0f} Gflop/s) in prefill.",
        figures=figures,
    )


def layer_table(timings: Sequence[LayerTiming]) -> Table:
    """Single matrices: times, and ratios to torch and to our own dense kernel."""
    rows: list[Sequence[str]] = []
    for row in timings:
        own = next((value for name, value in row.over.items() if name != "torch"), None)
        rows.append(
            (
                row.site,
                "×".join(map(str, row.shape)),
                f"{row.sparsity:.0%}",
                str(row.batch),
                row.kernel,
                f"{1e3 * row.seconds[1]:.3f} ms",
                f"{row.bytes:.2f}",
                f"{row.over['torch']:.2f}",
                "-" if own is None else f"{own:.2f}",
            )
        )
    return table(
        "matrix,shape,zeros,batch,kernel,time,bytes,over torch,over own dense",
        rows,
        caption="Times: median over rounds. Ratios: how many times faster than torch and our own "
        "dense kernel with the same values. Bytes: how many times less is read than by torch.",
        figures="shape,zeros,batch,time,bytes,over torch,over own dense",
    )


def validation_table(validation: Validation) -> Table:
    """What a runtime does with each tensor."""
    return table(
        "tensor,shape,dtype,sparsity,promised,used,why",
        validation_rows(validation),
        title=f"{validation.folder} in {validation.runtime}",
    )


def doctor_lines(examination: Examination) -> Iterator[str]:
    """What this machine can run, a line each."""
    machine = examination.machine
    memory = in_words(machine["memory_bytes"], ("GiB",), ".0f")
    yield f"{machine['processor']}, {machine['cores']} cores, {memory}, {machine['system']}"
    yield ", ".join(f"{name} {version}" for name, version in examination.versions.items())
    missing = "not compiled: install gcc or clang, then install the package again"
    yield f"packed products: {examination.packed or missing}"
    yield f"accelerator: {examination.cuda or 'none that torch can use'}"
    if examination.cuda:
        yield f"cuSPARSELt: {examination.cusparselt or 'not in this build of torch'}"
    for name, why in examination.runtimes.items():
        yield f"runtime {name}: {'yes' if why is None else f'no, {why}'}"
    for name, loaded_by in examination.formats.items():
        yield f"format {name}: loaded by {loaded_by}"
    packages = examination.packages.items()
    there = ", ".join(f"{name} {version}" for name, version in packages if version is not None)
    lacking = ", ".join(name for name, version in packages if version is None)
    yield f"optional packages: {there or 'none'}; not installed: {lacking or 'none'}"
