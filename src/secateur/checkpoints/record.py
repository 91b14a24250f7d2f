"""What `pruning.json` holds: a report of every weight matrix of a run, and one of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from secateur.checkpoints.folder import RECORD
from secateur.checkpoints.hub import commit_of
from secateur.checkpoints.quantised.unpack import source_of
from secateur.errors import BadCheckpoint, in_one_line
from secateur.system.json_files import read_json
from secateur.system.machine import typed_command, versions
from secateur.system.tensors import count_zeros
from secateur.system.typed import Fields, Whole, read_as


class _Matrix(Fields):
    site: str
    pattern: str | None = None


class _Record(Fields):
    """What is read of pruning.json."""

    method: str | None = None
    pattern: str | None = None
    sites: list[_Matrix] | None = None
    parameters: tuple[Whole, Whole] | None = None
    removed: dict[str, str] | None = None
    values: str | None = None


LEFT_OUT, UNSEEN = "left out", "unseen: no calibration token was seen to go through it"
UNSEEN_ROUNDED = f"{UNSEEN}; rounded to nearest, no weight taken out"


@dataclass(frozen=True)
class MatrixReport:
    """What became of one weight matrix. `pattern` is None where it was left dense; `note` says why.

    `output_error` is ‖(W − W') X‖² / ‖W X‖² on inputs X of about `PROBE_TOKENS` calibration tokens,
    those that the pruned blocks before give; None where it saw none of them, and where `+distil`
    has changed the weights since.
    """

    site: str
    shape: tuple[int, int]
    pattern: str | None
    sparsity: float
    output_error: float | None
    note: str = ""
    zeros_before: int = 0
    """How many of its weights were zero in the source; 0 where that is less than a hundredth."""
    zeros_filled: int = 0
    """How many of these are not zero any more."""
    rounded_away: int = 0
    """How many weights that its mask keeps became zero by rounding to `--values`."""

    def tuned(self, zeros: int | None) -> MatrixReport:
        """The same after its kept weights were tuned; with so many zeros where some came to be."""
        if zeros is None:
            return replace(self, output_error=None)
        size = self.shape[0] * self.shape[1]
        away = self.rounded_away + zeros - round(self.sparsity * size)
        return replace(self, output_error=None, sparsity=zeros / size, rounded_away=away)


@dataclass
class Report:
    """What a pruning run did."""

    method: str
    pattern: str
    kind: str
    sparsity: float
    coverage: float
    sites: list[MatrixReport]
    seconds: Seconds
    peak_bytes: int | None
    calibration: dict[str, Any]
    allocation: str = "uniform"
    refined: dict[str, tuple[float, float]] = field(default_factory=dict)
    """With `+refine`: the relative output error of each block before and after, on the windows that
    judge.
    """
    distilled: tuple[float, float] | None = None
    """With `+distil`: KL(dense ‖ pruned) before and after, nats a token of the windows held back.
    """
    parameters: tuple[int, int] | None = None
    """Of a smaller model: how many parameters it had and has."""
    removed: dict[str, str] = field(default_factory=dict)
    """Of a smaller model: what was taken out of which part of a block, and which blocks."""
    out: Path | None = None
    note: str = ""
    """What the reader must know of the run as a whole, in a sentence."""
    values: str = "as stored"
    """What kept weights may be (methods/values.py)."""

    def take(self, block: dict[str, Any]) -> None:
        """Add a finished block, as JSON can hold it: `PrunedBlock.entry`."""
        for matrix in block["sites"]:
            self.sites.append(MatrixReport(**{**matrix, "shape": tuple(matrix["shape"])}))
        if block["refined"]:
            before, after = block["refined"]
            self.refined[block["block"]] = (before, after)

    def end(self, peak_bytes: int | None) -> None:
        """Sum up what the blocks were, and what the run held at most."""
        self.sparsity, self.peak_bytes = total_sparsity(self.sites), peak_bytes
        self.remark(filled_in_words(self.sites))
        self.remark(rounded_away_in_words(self.sites))

    def remark(self, sentence: str) -> None:
        """Add a sentence to what the reader must know of the run, unless it is empty."""
        self.note = " ".join(filter(None, (self.note, sentence)))

    def record(self) -> dict[str, Any]:
        """What a repeated run gives again, as JSON can hold it: no times, no memory, no place."""
        values = asdict(self)
        for matrix in values["sites"]:
            if not matrix["zeros_before"]:
                del matrix["zeros_before"], matrix["zeros_filled"]
            if self.values == "as stored":
                del matrix["rounded_away"]
        left_out = {"seconds", "peak_bytes", "out"} | ({"note"} if not self.note else set())
        left_out |= {"distilled"} if self.distilled is None else set()
        left_out |= {"values"} if self.values == "as stored" else set()
        return {key: values[key] for key in values if key not in left_out}


def filled_in_words(reports: Sequence[MatrixReport]) -> str:
    """A sentence on zeros of the source that are none any more; empty where there are none."""
    before, filled = (
        sum(getattr(report, name) for report in reports)
        for name in ("zeros_before", "zeros_filled")
    )
    if not filled:
        return ""
    return (
        f"{filled:,} of {before:,} zeros of the source ({filled / before:.1%}) were filled; "
        "--keep-zeros keeps them."
    )


def rounded_away_in_words(reports: Sequence[MatrixReport]) -> str:
    """A sentence on kept weights that became zero by rounding; empty where none did."""
    vanished = sum(report.rounded_away for report in reports)
    if not vanished:
        return ""
    whole = sum(rows * columns for rows, columns in (report.shape for report in reports))
    return (
        f"{vanished:,} weights that the mask keeps ({vanished / whole:.1%} of all) rounded to "
        "zero, and count as zeros."
    )


def total_sparsity(reports: Sequence[MatrixReport]) -> float:
    """The share of zeros over all weight matrices, by weights."""
    sizes = [rows * columns for rows, columns in (report.shape for report in reports)]
    zeros = sum(size * report.sparsity for size, report in zip(sizes, reports, strict=True))
    return zeros / max(sum(sizes), 1)


def output_error(inputs: Tensor, change: Tensor, weight: Tensor) -> float:
    """‖change X‖² / ‖weight X‖² for inputs X `[tokens, in]` and matrices `[out, in]`, all float32.

    Weights near the end of the range overflow there; they are multiplied once more in float64.
    """
    lost, whole = ((inputs @ part.T).square().sum() for part in (change, weight))
    if not (lost + whole).isfinite():
        return output_error(inputs.double(), change.double(), weight.double())
    return (lost / whole.clamp_min(1e-30)).item()


def zeros_in_source(before: Tensor, after: Tensor) -> tuple[int, int]:
    """How many weights were zero, and how many of these are not any more; (0, 0) where less than a
    hundredth was.
    """
    zeros = count_zeros(before)
    if zeros < before.numel() / 100:
        return 0, 0
    return zeros, zeros - int(((before == 0) & (after == 0)).sum())


def read_from(folder: Path) -> str:
    """A sentence on the format that a folder was unpacked from; empty where it was not."""
    unpacked_from = source_of(folder)
    return f"Read from {unpacked_from['format']}." if unpacked_from else ""


def pruning_record(
    source: Path,
    report: Report,
    calibration: Mapping[str, Any],
    command: Sequence[str] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What `pruning.json` holds of a run on the checkpoint in `source` and some `calibration`."""
    unpacked_from = source_of(source)
    origin = Path(unpacked_from["folder"]) if unpacked_from else source
    return {
        "schema": "secateur.pruning/1",
        "model": str(origin),
        **({"source": unpacked_from} if unpacked_from else {}),
        **({"hub": commit} if (commit := commit_of(origin)) else {}),
        "command": typed_command(command),
        "versions": versions(),
        **report.record(),
        "calibration": dict(calibration),
        "options": dict(options),
    }


@dataclass
class Seconds:
    """Where the time of a run goes, in seconds; concurrent devices add up."""

    forward: float = 0.0
    statistics: float = 0.0
    solve: float = 0.0
    refine: float = 0.0
    plan: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """Add the time between entering and leaving to the field of that name."""
        started = perf_counter()
        yield
        setattr(self, what, getattr(self, what) + perf_counter() - started)


def record_of(folder: Path) -> dict[str, Any] | None:
    """The folder's own pruning.json, None where it has none. Raises BadCheckpoint for a bad one."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        record = read_json(file, finite=True)
    except ValueError as error:
        raise BadCheckpoint(
            f"{file} is no JSON ({in_one_line(error)}). Delete it, or prune again."
        ) from error
    if not isinstance(record, dict):
        raise BadCheckpoint(
            f"{file} holds a {type(record).__name__}; an object was wanted. Delete it, or prune "
            "again."
        )
    try:
        read_as(_Record, record)
    except ValueError as error:
        raise BadCheckpoint(
            f"{file} is no record of a pruning run: {error}. Delete it, or prune again."
        ) from error
    return record
