"""The schema of a comparison: what `results.json` holds. docs/results.md says what each field means."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "secateur.results/2"


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

    @property
    def name(self) -> str:
        return row_name(self.method, self.pattern, self.allocation, self.values)


def row_name(method: str, pattern: str, allocation: str = "uniform", values: str = "as stored") -> str:
    """What tells a row from the others of its table."""
    shared = "" if allocation == "uniform" else f" {allocation}"
    return f"{method} {pattern}{shared}" + ("" if values == "as stored" else f" {values}")


@dataclass
class Results:
    """A whole comparison, as `results.json` holds it."""

    schema: str
    model: dict[str, Any]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: list[str]
    rows: list[Row]
    not_timed: dict[str, str] = field(default_factory=dict)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
