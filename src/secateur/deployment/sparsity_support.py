"""Says what each runtime does with the zeros of a weight matrix, and why.

What is known, with its sources and dates, stands in `sparsity_support.toml`; here are the functions
that judge by it. They know shapes, dtypes and patterns and run nothing, so where a runtime times
its kernels and takes the faster one, a yes means that it may. What TensorRT did in the end is in
its log, which `parse_build_log` reads. A new runtime is a table of the file, and a function in
`OBJECTIONS` if it uses any zeros.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from secateur.deployment.packing import LEAST
from secateur.kernels.packed import MOST

KNOWN: Mapping[str, Any] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
"""Everything that is known of runtimes and hardware, as the file has it."""

LINEAR, CONV1D, EXPERTS = "linear layer", "Conv1D", "stack of experts"

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "F8_E4M3": "float8",
}

MULTIPLES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    backend: {dtype: (rows, columns) for dtype, (rows, columns) in table.items()}
    for backend, table in KNOWN["torch_multiples"].items()
}
"""What torch's two backends for 2:4 want outputs and inputs to be multiples of, by dtype."""

FEW_ROWS = 64
"""So many rows of x or fewer are bound by what is read of the weights, and torch's sparse products
then lose.
"""


@dataclass(frozen=True)
class Matrix:
    """A tensor of a checkpoint that is a weight matrix, or several, as a rule sees it.

    `rows` are its outputs, `columns` its inputs. `crowded` is the share of groups of four
    consecutive inputs that keep more than two weights: 0 is 2:4, 1 where the inputs are no groups
    of four. `crowded_outputs` is the same along the outputs.
    """

    name: str
    kind: str
    dtype: str
    rows: int
    columns: int
    sparsity: float
    crowded: float
    crowded_outputs: float
    negative_zeros: int
    not_finite: int


class Verdict(NamedTuple):
    """Whether a runtime uses the zeros of a matrix, and why."""

    used: bool
    reason: str


@dataclass(frozen=True)
class Rule:
    """What is known of a runtime's use of zeros; sparsity_support.toml says what each field means.

    `build` is the command that makes an engine from what `export` writes; it may name `{folder}`.
    """

    name: str
    source: str = ""
    date: str = ""
    uses: str = ""
    never: str = ""
    yes: str = ""
    wide: int = 0
    certain: bool = True
    notes: Sequence[str] = ()
    build: str = ""
    build_remark: str = ""
    silently_dense: Mapping[str, str] = field(default_factory=dict)
    export: str = ""
    accelerated: bool = False
    alike: str = ""

    def judge(self, matrix: Matrix, rows: int) -> Verdict:
        """Whether it uses the zeros of a matrix that has some, multiplied by so many rows of x."""
        if why := self.never or OBJECTIONS[self.name](matrix, rows):
            return Verdict(False, why)
        if min(matrix.rows, matrix.columns) < self.wide:
            seen = f"but NVIDIA saw them win from {self.wide} inputs and outputs on"
            return Verdict(True, f"{self.yes}, {seen}")
        return Verdict(True, self.yes)

    def remarks(self, folder: str) -> list[str]:
        """What is to be told with the answer for a checkpoint folder."""
        build = self.build.replace("{folder}", folder)
        return [
            *([f"Build: {', '.join(filter(None, (build, self.build_remark)))}"] if build else ()),
            *(f"Dense in silence with {how}: {why}." for how, why in self.silently_dense.items()),
            *(() if self.certain else (KNOWN["uncertain"]["note"],)),
            *self.notes,
        ]


@dataclass(frozen=True)
class SparsityReport:
    """What a pair of `(Sparsity)` lines of a build log says; some versions leave out the names."""

    eligible: int
    picked: int
    eligible_layers: tuple[str, ...] = ()
    picked_layers: tuple[str, ...] = ()


def not_two_of_four(matrix: Matrix) -> str | None:
    """Why a matrix is not 2:4 along its inputs; None where it is."""
    if matrix.columns % 4:
        return f"{matrix.columns} inputs are no groups of 4"
    if not matrix.crowded:
        return None
    if not matrix.crowded_outputs:
        return "2:4 in 100 % of the groups along outputs: the wrong axis, products add over inputs"
    return (
        f"{matrix.crowded:.2%} of the groups of 4 inputs keep more than 2 weights, so it is not 2:4"
    )


def _packed(matrix: Matrix, rows: int) -> str | None:
    if matrix.kind != LINEAR:
        return f"a {matrix.kind}; only linear layers are packed"
    if matrix.dtype not in ("F32", "BF16"):
        return f"{_dtype(matrix)}; float32 and bfloat16 are packed"
    if matrix.sparsity < LEAST:
        return f"{matrix.sparsity:.1%} zeros; from {LEAST:.0%} on a matrix is packed"
    if rows > MOST:
        dense = f"for more than {MOST} a packed matrix is unpacked and multiplied densely"
        return f"{rows} rows of x: {dense}"
    return None


def _semi_structured(matrix: Matrix, rows: int) -> str | None:
    if why := not_two_of_four(matrix):
        return why
    if matrix.kind != LINEAR:
        return f"a {matrix.kind}; torch converts the weights of linear layers"
    if matrix.dtype == "F32":
        return "float32: its sparse tensor cores take 1:2, not 2:4; cast the model to bfloat16"
    tables = {
        name: table[matrix.dtype] for name, table in MULTIPLES.items() if matrix.dtype in table
    }
    if not tables:
        return f"{_dtype(matrix)}: float16 or bfloat16 was wanted"
    if all(matrix.rows % outputs or matrix.columns % inputs for outputs, inputs in tables.values()):
        wanted = ", ".join(f"{multiples} for {backend}" for backend, multiples in tables.items())
        return f"[{matrix.rows}, {matrix.columns}] is no multiple of {wanted}"
    if rows <= FEW_ROWS:
        few = f"with {FEW_ROWS} or fewer the sparse product is no faster than the dense one"
        return f"{rows} rows of x: {few}"
    return None


def _tensorrt(matrix: Matrix, rows: int) -> str | None:
    if why := not_two_of_four(matrix):
        return why
    if matrix.dtype not in ("F16", "BF16", "I8", "F8_E4M3"):
        return f"{_dtype(matrix)}: float16, bfloat16, int8 or float8 was wanted"
    if matrix.rows % 8 or matrix.columns % 16:
        return f"[{matrix.rows}, {matrix.columns}] is no multiple of (8, 16)"
    if matrix.negative_zeros:
        return f"{matrix.negative_zeros} zeros are -0.0, which not every kernel takes for zero"
    return None


def _dtype(matrix: Matrix) -> str:
    return DTYPES.get(matrix.dtype, matrix.dtype)


OBJECTIONS: Mapping[str, Callable[[Matrix, int], str | None]] = {
    "packed": _packed,
    "packed-int8": _packed,
    "packed-int4": _packed,
    "semi-structured": _semi_structured,
    "tensorrt": _tensorrt,
    "tensorrt-llm": lambda matrix, rows: not_two_of_four(matrix),
}
"""Why a runtime that uses some zeros does not use those of a matrix at so many rows of x, or None.
"""

RUNTIME_FACTS: Mapping[str, Rule] = {
    name: Rule(name, **facts) for name, facts in KNOWN["runtimes"].items()
}
"""All that the file says of runtimes, those included that only the priors are about."""

RULES: Mapping[str, Rule] = {name: rule for name, rule in RUNTIME_FACTS.items() if rule.source}
"""How each runtime treats zeros. A smaller model needs no rule: it is smaller everywhere."""


_LINES = {
    "eligible": re.compile(
        r"\(Sparsity\) (?:Layers eligible for sparse math"
        r"|Found (\d+) layer\S* eligible[^:\n]*):?(.*)"
    ),
    "picked": re.compile(
        r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
        r"|Chose (\d+) layer[^:\n]*):?(.*)"
    ),
}


def parse_build_log(text: str) -> tuple[SparsityReport, ...]:
    """Read what TensorRT says of sparsity in a verbose build log, the final engine's report last.

    TensorRT 8 gives names, later versions counts and, in some, names. Whatever stands before
    `(Sparsity)` in a line is ignored. Empty where the log says nothing: --weight_sparsity or
    --log_level verbose was missing, or no product reached TensorRT (`Rule.silently_dense`).
    """
    reports, waiting = [], None
    for line in text.splitlines():
        if match := _LINES["eligible"].search(line):
            waiting = _counted(match)
        elif (match := _LINES["picked"].search(line)) and waiting:
            (count, names), (picked, picked_names) = waiting, _counted(match)
            reports.append(SparsityReport(count, picked, names, picked_names))
            waiting = None
    return tuple(reports)


def _counted(match: re.Match[str]) -> tuple[int, tuple[str, ...]]:
    names = tuple(name for part in match[2].split(", ") if (name := part.strip(" ,")))
    return int(match[1]) if match[1] else len(names), names
