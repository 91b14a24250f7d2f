"""The schema of a comparison: what `results.json` holds. docs/results.md says what each field means."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "secateur.results/1"


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

    @property
    def name(self) -> str:
        return row_name(self.method, self.pattern, self.allocation)


def row_name(method: str, pattern: str, allocation: str = "uniform") -> str:
    """What tells a row from the others of its table."""
    return f"{method} {pattern}" + ("" if allocation == "uniform" else f" {allocation}")


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

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
