"""The schema of a comparison: what `results.json` holds, as docs/results.md explains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from secateur.errors import BadPattern, BadResults
from secateur.system.json_files import json_text, read_json
from secateur.system.typed import Fields, Number, Whole, holds, read_as

SCHEMA = "secateur.results/5"
Kind = Literal["dense", "unstructured", "semi-structured", "structured", "quantised"]
KINDS = get_args(Kind)
MOST_LOSS = 700.0
"""Nats a token; the perplexity of more is no number."""

RANK = r"^([0-9]{1,6}(-[0-9]{1,6} tie)?)?$"
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Triple = Annotated[list[Positive], Field(min_length=3, max_length=3)]


class Model(Fields):
    """What is read of the model of a comparison."""

    name: str
    parameters: Whole


class Machine(Fields):
    """What is read of the machine of a comparison."""

    processor: str
    system: str
    threads: Whole
    accelerators: list[str]


class Text(Fields):
    """What is read of a calibration, evaluation or recovery text."""

    source: str
    split: str
    samples: Whole
    length: Whole
    sha256: str
    seed: Whole | None = None
    bos: str | None = None
    counted: str | None = None
    counted_tokens: Whole | None = None
    generated: dict[str, Any] | None = None


class Timed(Fields):
    """What is read of a timing of a row: decoding, prefill or both."""

    runtime: str
    dtype: str
    against: str
    batch: Whole
    prompt: Whole
    weight_bytes: Annotated[Whole, Field(gt=0)]
    memory_bytes: Whole | None = None
    decode: Triple | None = None
    decode_ratio: Triple | None = None
    over_eager: Triple | None = None
    prefill: Triple | None = None
    prefill_ratio: Triple | None = None
    tokens_per_second: Number | None = None
    new_tokens: Whole | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Timed:
        given = {"decode", "prefill"} & self.model_fields_set
        if not given:
            raise ValueError("it has neither decode nor prefill")
        needed = {"prefill_ratio", *given}
        if "decode" in given:
            needed |= {"decode_ratio", "over_eager", "tokens_per_second", "new_tokens"}
        for name in sorted(needed):
            if getattr(self, name) is None:
                raise ValueError(f"it has no {name}")
        return self


class Answered(Fields):
    """What is read of a row's answers on a task, or of the mean over tasks."""

    accuracy: Number
    stderr: Number | None
    delta: Number | None
    delta_interval: Pair | None
    items: Whole | None = None
    tasks: Whole | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Answered:
        if self.items is None and self.tasks is None:
            raise ValueError("it says neither items nor tasks")
        if (self.delta is None) != (self.delta_interval is None):
            raise ValueError("it has no difference with its interval")
        return self


@dataclass(frozen=True)
class ToleranceResult:
    """How far a method goes in a family of patterns.

    `pattern` is the largest whole percent before the first whose perplexity is above `most`, taken
    by the estimate; None where the least that can go is too much. `certain`: whether the upper end
    of its 95 % interval is within too. `beyond` is that first percent; None where the search ended.
    `note`: why `beyond` cannot be had at all.
    """

    method: str
    allocation: str
    pattern: str | None
    perplexity: Number | None
    certain: bool
    beyond: str | None
    most: Number
    note: str

    def __post_init__(self) -> None:
        if (self.pattern is None) != (self.perplexity is None):
            raise ValueError("it has no pattern with its perplexity")


class Tolerance(Fields):
    """What is read of a search for a tolerance."""

    share: Number
    found: list[ToleranceResult]


def _searched(tolerance: dict[str, Any]) -> dict[str, Any]:
    if tolerance:
        read_as(Tolerance, tolerance)
    return tolerance


def _rising(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"{interval} is no interval")
    return interval


def _with_mean(tasks: dict[str, Any]) -> dict[str, Any]:
    if tasks and (tasks.get("mean") or {}).get("tasks") is None:
        raise ValueError("there are tasks without a mean")
    if odd := [name for name in tasks if name != "mean" and tasks[name].get("items") is None]:
        raise ValueError(f"{odd[0]} has no items")
    return tasks


@dataclass(frozen=True)
class Recovered:
    """How a row was fine-tuned after it was pruned; `text` as in `Results.calibrations`."""

    __pydantic_config__ = CLOSED

    way: str
    steps: Whole
    tokens: Whole
    rate: Number
    dtype: str
    seed: Whole
    text: Annotated[dict[str, Any], holds(Text)]
    seconds: Number = 0.0


@dataclass
class Row:
    """One line of the comparison; docs/results.md says what each field is."""

    __pydantic_config__ = CLOSED

    method: str
    pattern: str
    kind: Annotated[str, holds(Kind)]
    sparsity: Number
    perplexity: Positive
    delta: Number
    delta_interval: Annotated[tuple[Number, Number], AfterValidator(_rising)]
    kl: Number
    top1_agreement: Number
    seconds: dict[str, Number]
    peak_bytes: Whole | None
    disk_bytes: Annotated[Whole, Field(gt=0)]
    rank: Annotated[str, Field(pattern=RANK)] = ""
    ties: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    allocation: str = "uniform"
    parameters: Whole | None = None
    values: str = "as stored"
    latency: list[Annotated[dict[str, Any], holds(Timed)]] = field(default_factory=list)
    calibration: Whole | None = None
    tasks: Annotated[
        dict[str, Annotated[dict[str, Any], holds(Answered)]], AfterValidator(_with_mean)
    ] = field(default_factory=dict)
    sites: list[tuple[str, Number, Number | None]] = field(default_factory=list)
    loss: list[Annotated[float, Field(ge=0, lt=MOST_LOSS)]] = field(default_factory=list)
    searched: bool = False
    recovered: Recovered | None = None
    bits_per_byte: Number | None = None
    acceptance: Number | None = None
    bits: Number | None = None
    stored_as: str | None = None
    byte_rank: Annotated[str, Field(pattern=RANK)] = ""
    byte_ties: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return row_name(self.method, self.pattern, self.allocation, self.values, self.recovered)

    @property
    def took(self) -> float:
        """What it took to make it, fine-tuning with it, in seconds."""
        return sum(self.seconds.values())

    @property
    def peers(self) -> tuple[Any, ...]:
        """What rows that are ranked against each other share: pattern, values, recovery text."""
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

    __pydantic_config__ = CLOSED

    schema: str
    model: Annotated[dict[str, Any], holds(Model)]
    calibrations: Annotated[list[Annotated[dict[str, Any], holds(Text)]], Field(min_length=1)]
    evaluation: Annotated[dict[str, Any], holds(Text)]
    options: dict[str, Any]
    machine: Annotated[dict[str, Any], holds(Machine)]
    versions: dict[str, str]
    command: list[str]
    rows: list[Row]
    not_timed: dict[str, str] = field(default_factory=dict)
    tolerance: Annotated[dict[str, Any], AfterValidator(_searched)] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        """The row of the model as it came, which is the first."""
        return self.rows[0]

    @property
    def table(self) -> list[Row]:
        """The rows beside each other: of the first calibration text, and no steps of a search."""
        return [row for row in self.rows if not row.calibration and not row.searched]

    @property
    def pruned(self) -> list[Row]:
        """The rows of the table but the dense one."""
        return [row for row in self.table if row.kind != "dense"]

    def json(self) -> str:
        return json_text(asdict(self), finite=True)


def read_results(file: Path) -> Results:
    """The comparison in a `results.json`, or in the folder that has one. Raises BadResults."""
    file = file / "results.json" if file.is_dir() else file
    try:
        return _read(read_json(file, finite=True))
    except OSError as error:
        raise BadResults(
            f"{file} cannot be read: {error.strerror}. Name the results.json of a comparison."
        ) from error
    except ValueError as error:
        raise BadResults(f"{file} is no comparison: {error}. Run the comparison again.") from error


def check(results: Results) -> None:
    """Raise BadResults unless pages and advice can be made of a comparison in memory."""
    try:
        _read(asdict(results))
    except ValueError as error:
        message = f"The comparison cannot be used: {error}. Run the comparison again."
        raise BadResults(message) from error


def _read(value: Any) -> Results:
    """A comparison as JSON holds it. Raises ValueError."""
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, {SCHEMA} was wanted")
    results = read_as(Results, value)
    if not results.rows:
        raise ValueError("it has no rows")
    if results.dense.kind != "dense":
        raise ValueError("its first row is not the dense model")
    for number, row in enumerate(results.rows):
        named, losses, windows = row.calibration, len(row.loss), results.evaluation["samples"]
        if named is not None and not 0 <= named < len(results.calibrations):
            raise ValueError(f"row {number} names calibration {named}, which is not there")
        if losses not in (0, windows):
            raise ValueError(f"{row.name} has {losses} losses of {windows} windows")
    return results


def find_tolerance(text: str | float | None) -> float | None:
    """The share that `5%` or 0.05 names. Raises BadPattern outside 0 to 1."""
    if text is None:
        return None
    try:
        share = float(str(text).strip().removesuffix("%"))
        share /= 100 if str(text).strip().endswith("%") else 1
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise BadPattern(
            f"A tolerance is a share of the dense perplexity such as '5%'; found {text!r}."
        )
    return share
