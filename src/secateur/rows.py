"""How a row of a comparison is made: a model is evaluated beside the dense one, window by window."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.evaluate import Forward, Measured, measure, perplexity_difference
from secateur.export import export
from secateur.flow import Seconds
from secateur.model import load
from secateur.progress import Progress
from secateur.record import Report
from secateur.replay import LanguageModel
from secateur.results import Row
from secateur.sites import sites


def dense_row(source: Checkpoint, dense: Forward, progress: Progress) -> tuple[Row, Measured]:
    """The row of the model as it came."""
    progress.begin("evaluating the dense model")
    measured = measure(dense, None, progress)
    row = Row(
        "dense", "-", "dense", _zeros(dense.language_model), measured.perplexity, 0.0, (0.0, 0.0), 0.0, 1.0,
        asdict(Seconds()), None, source.bytes, parameters=dense.language_model.model.num_parameters(),
    )  # fmt: skip
    return row, measured


def pruned_row(
    report: Report,
    place: Path,
    dense: Forward,
    expected: Measured,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Row, Measured]:
    """The row of a checkpoint that was just pruned, which lies at `place`; `expected` is the dense model's loss."""
    progress.begin(f"evaluating {report.method} {report.pattern}")
    spill = place.parent if dense.language_model.spilled else None
    pruned = load(place, trust_remote_code=trust_remote_code, spill=spill)
    measured = measure(dense.of(pruned), dense, progress)
    delta, interval = perplexity_difference(measured.loss, expected.loss)
    row = Row(
        report.method, report.pattern, report.kind, report.sparsity, measured.perplexity, delta, interval,
        measured.mean_kl or 0.0, measured.mean_agreement or 0.0, asdict(report.seconds), report.peak_bytes,
        open_checkpoint(place).bytes, allocation=report.allocation, parameters=pruned.model.num_parameters(),
    )  # fmt: skip
    return row, measured


def rounded_row(
    kept: Row,
    out: Path,
    dense: Forward,
    expected: Measured,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Row, Measured]:
    """The row of a pruned checkpoint whose kept weights are rounded to int8: packed, and evaluated as it comes back."""
    assert kept.checkpoint is not None
    place = Path(f"{kept.checkpoint}-int8")
    progress.begin(f"evaluating {kept.name} int8")
    export(
        out / kept.checkpoint,
        out=out / place,
        to="packed",
        values="int8",
        overwrite=True,
        trust_remote_code=trust_remote_code,
    )
    with TemporaryDirectory(dir=out) as temporary:
        back = Path(temporary) / "dense"
        export(out / place, out=back, to="dense")
        spill = out if dense.language_model.spilled else None
        loaded = load(back, trust_remote_code=trust_remote_code, spill=spill)
        measured = measure(dense.of(loaded), dense, progress)
    delta, interval = perplexity_difference(measured.loss, expected.loss)
    size = sum(file.stat().st_size for file in (out / place).glob("*.safetensors"))
    row = replace(
        kept, perplexity=measured.perplexity, delta=delta, delta_interval=interval, kl=measured.mean_kl or 0.0,
        top1_agreement=measured.mean_agreement or 0.0, disk_bytes=size, checkpoint=str(place), values="int8",
        rank="", ties=[], latency=[],
    )  # fmt: skip
    return row, measured


def _zeros(language_model: LanguageModel) -> float:
    """The share of zeros in the sites of a model, which may have been pruned before."""
    held = [site.stored for block in language_model.blocks for site in sites(block).values()]
    return sum((weight == 0).sum().item() for weight in held) / max(sum(weight.numel() for weight in held), 1)
