"""The schema of a comparison: what `results.json` holds. docs/results.md says what each field
means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from secateur.errors import BadPattern, BadResults
from secateur.system.json_files import fits, json_text, read_json

SCHEMA = "secateur.results/5"
KINDS = ("dense", "unstructured", "semi-structured", "structured")
MOST_LOSS = 700.0
"""Nats a token; the perplexity of more is no number."""


@dataclass(frozen=True)
class Recovered:
    """How a row was fine-tuned after it was pruned, in how many `seconds`; `text` as in
    `Results.calibrations`.
    """

    way: str
    steps: int
    tokens: int
    rate: float
    dtype: str
    seed: int
    text: dict[str, Any]
    seconds: float = 0.0


@dataclass
class Row:
    """One line of the comparison; docs/results.md says what each field is."""

    method: str
    pattern: str
    kind: str
    sparsity: float
    perplexity: float
    delta: float
    delta_interval: tuple[float, float]
    kl: float
    top1_agreement: float
    seconds: dict[str, float]
    peak_bytes: int | None
    disk_bytes: int
    rank: str = ""
    ties: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    allocation: str = "uniform"
    parameters: int | None = None
    values: str = "as stored"
    latency: list[dict[str, Any]] = field(default_factory=list)
    calibration: int | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: list[tuple[str, float, float | None]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    searched: bool = False
    recovered: Recovered | None = None

    @property
    def name(self) -> str:
        return row_name(self.method, self.pattern, self.allocation, self.values, self.recovered)

    @property
    def peers(self) -> tuple[Any, ...]:
        """What rows that are ranked against each other have in common: pattern, exactness, text of
        recovery.
        """
        return self.pattern, self.values, self.recovered and self.recovered.text["sha256"]


def row_name(
    method: str,
    pattern: str,
    allocation: str = "uniform",
    values: str = "as stored",
    recovered: Recovered | None = None,
) -> str:
    """What tells a row from the others of its table, where all are calibrated alike."""
    shared = "" if allocation == "uniform" else f" {allocation}"
    rounded = "" if values == "as stored" else f" {values}"
    trained = f" recovered by {recovered.way} in {recovered.steps} steps" if recovered else ""
    return f"{method} {pattern}{shared}{rounded}{trained}"


@dataclass
class Results:
    """A whole comparison, as `results.json` holds it.

    `calibrations` are the draws of calibration text, the one of the table first; a row names its
    own by its number.
    """

    schema: str
    model: dict[str, Any]
    calibrations: list[dict[str, Any]]
    evaluation: dict[str, Any]
    options: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: list[str]
    rows: list[Row]
    not_timed: dict[str, str] = field(default_factory=dict)
    tolerance: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> Row:
        """The row of the model as it came, which is the first."""
        return self.rows[0]

    @property
    def table(self) -> list[Row]:
        """The rows that stand beside each other: of one draw of calibration text or none, and no
        steps of a search.
        """
        return [row for row in self.rows if not row.calibration and not row.searched]

    def json(self) -> str:
        return json_text(asdict(self), finite=True)


def read_results(file: Path) -> Results:
    """The comparison in a `results.json`, or in the folder that has one. Raises BadResults."""
    file = file / "results.json" if file.is_dir() else file
    try:
        held = read_json(file, finite=True)
        schema = held.get("schema") if isinstance(held, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"its schema is {schema!r}, {SCHEMA} was wanted; run the comparison again"
            )
        _check(held, Results, "it", {"rows"})
        if not isinstance(held["rows"], list) or not held["rows"]:
            raise ValueError("it has no rows")
        rows = [read_row(row, f"row {number}") for number, row in enumerate(held["rows"])]
        for number, row in enumerate(rows):
            if row.calibration is not None and not 0 <= row.calibration < len(held["calibrations"]):
                raise ValueError(
                    f"row {number} names calibration {row.calibration}, which is not there"
                )
        if rows[0].kind != "dense":
            raise ValueError("its first row is not the dense model")
    except OSError as error:
        raise BadResults(
            f"{file} cannot be read: {error.strerror}. Name the results.json of a comparison."
        ) from error
    except ValueError as error:
        raise BadResults(f"{file} is no comparison: {error}.") from error
    return Results(**{**held, "rows": rows})


def read_row(held: Any, what: str) -> Row:
    """A row as JSON holds it; `what` names it. Raises ValueError."""
    _check(held, Row, what, {"recovered"})
    if (recovered := held["recovered"]) is not None:
        _check(recovered, Recovered, f"the recovery of {what}", ())
        if not fits(recovered["text"].get("sha256"), str):
            raise ValueError(f"the recovery of {what} names no text")
        recovered = Recovered(**recovered)
    return Row(
        **{
            **held,
            "delta_interval": tuple(held["delta_interval"]),
            "sites": [tuple(site) for site in held["sites"]],
            "recovered": recovered,
        }
    )


def _check(held: Any, kind: type, what: str, apart: Iterable[str]) -> None:
    """Raise ValueError unless a JSON object holds the fields of a dataclass, each of its type."""
    if not isinstance(held, dict):
        raise ValueError(f"{what} is no object")
    hints, known = get_type_hints(kind), {one.name for one in fields(kind)}
    if held.keys() != known:
        odd = sorted(held.keys() ^ known)
        raise ValueError(
            f"{what} {'lacks' if odd[0] in known else 'has an unknown'} field {odd[0]!r}"
        )
    for name in known - set(apart):
        if not fits(held[name], hints[name]):
            raise ValueError(f"field {name!r} of {what} is of another type")


def find_tolerance(text: str | float | None) -> float | None:
    """The share that `5%` or 0.05 names. Raises BadPattern outside 0 to 1."""
    if text is None:
        return None
    try:
        share = float(str(text).strip().removesuffix("%")) / (
            100 if str(text).strip().endswith("%") else 1
        )
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise BadPattern(
            f"A tolerance is a share of the dense perplexity such as '5%'; found {text!r}."
        )
    return share
