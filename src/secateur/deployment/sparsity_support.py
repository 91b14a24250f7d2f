"""What each runtime does with zeros in the weights: an entry a runtime, with where that is known
from, and when.

A rule judges one matrix and says why. It knows shapes, dtypes, patterns and what has been published
of the kernels; it runs nothing, so where a runtime times its kernels and takes the faster one, a
yes means that it may. A new runtime is a line in `RULES`. Runtimes change: each entry carries the
versions that it was read or measured in and the date. What TensorRT did in the end is in its log,
which `parse_build_log` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from secateur.checkpoints.folder import Checkpoint
from secateur.deployment.formats.tensorrt_llm import BUILD_COMMAND, PRUNED, SILENTLY_DENSE, eligible
from secateur.deployment.packed_model import LEAST
from secateur.kernels.packed import MOST

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
    "cuSPARSELt": {"F16": (16, 16), "BF16": (16, 16), "I8": (32, 32), "F8_E4M3": (32, 32)},
    "CUTLASS": {"F16": (32, 64), "BF16": (32, 64), "I8": (16, 128)},
}
"""What torch's two backends for 2:4 want outputs and inputs to be multiples of (torch 2.13,
semi_structured.py).
"""

WIDE = 256
"""Inputs and outputs from which on sparse kernels were seen to win in TensorRT (TensorRT#3849,
#4065).
"""

FEW_ROWS = 64
"""So many rows of x or fewer are bound by what is read of the weights, and torch's sparse products
then lose.
"""


@dataclass(frozen=True)
class Matrix:
    """What a rule is told of a tensor that is a site, or several. `rows` are its outputs, `columns`
    its inputs.

    `crowded` is the share of groups of four consecutive inputs that keep more than two weights: 0
    is 2:4, 1 where the inputs are no groups of four. `crowded_outputs` is the same along the
    outputs.
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


class Rule(NamedTuple):
    """How one runtime treats zeros. `judge(matrix, rows of x)` is asked for matrices that have
    zeros.

    `whole(checkpoint, ranks)` adds why not, by site, for what one matrix does not show; it may
    raise UnsupportedModel. `notes` are printed with the answer; they may name `{folder}`. Where the
    runtime times its kernels and chooses, a yes is not `certain`.
    """

    judge: Callable[[Matrix, int], Verdict]
    source: str
    date: str
    notes: tuple[str, ...] = ()
    whole: Callable[[Checkpoint, int], Mapping[str, str]] | None = None
    certain: bool = True


@dataclass(frozen=True)
class SparsityReport:
    """What one pair of `(Sparsity)` lines of a build log says. Names are left out by some versions
    of TensorRT.
    """

    eligible: int
    picked: int
    eligible_layers: tuple[str, ...] = ()
    picked_layers: tuple[str, ...] = ()


def never(reason: str) -> Callable[[Matrix, int], Verdict]:
    """The rule of a runtime that multiplies by zeros as by other numbers."""
    return lambda matrix, batch: Verdict(False, reason)


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


def _two_of_four(
    objection: Callable[[Matrix, int], str | None], yes: Callable[[Matrix], str]
) -> Callable[[Matrix, int], Verdict]:
    """A rule that wants 2:4 and then has no objection of its own; `yes(matrix)` is the reason of a
    yes.
    """

    def judge(matrix: Matrix, batch: int) -> Verdict:
        why = not_two_of_four(matrix) or objection(matrix, batch)
        return Verdict(not why, why or yes(matrix))

    return judge


def _packed(matrix: Matrix, batch: int) -> Verdict:
    if matrix.kind != LINEAR:
        return Verdict(False, f"a {matrix.kind}; only linear layers are packed")
    if matrix.dtype not in ("F32", "BF16"):
        return Verdict(False, f"{_dtype(matrix)}; float32 and bfloat16 are packed")
    if matrix.sparsity < LEAST:
        return Verdict(
            False, f"{matrix.sparsity:.1%} zeros; from {LEAST:.0%} on a matrix is packed"
        )
    if batch > MOST:
        return Verdict(
            False,
            f"{batch} rows of x: for more than {MOST} a packed matrix is unpacked and multiplied densely",
        )
    return Verdict(True, "its zeros are neither stored nor read")


def _semi_structured(matrix: Matrix, batch: int) -> str | None:
    if matrix.kind != LINEAR:
        return f"a {matrix.kind}; torch converts the weights of linear layers"
    if matrix.dtype == "F32":
        return "float32: its sparse tensor cores take 1:2, not 2:4; cast the model to bfloat16"
    tables = {
        backend: table[matrix.dtype]
        for backend, table in MULTIPLES.items()
        if matrix.dtype in table
    }
    if not tables:
        return f"{_dtype(matrix)}: float16 or bfloat16 was wanted"
    if all(matrix.rows % rows or matrix.columns % columns for rows, columns in tables.values()):
        wanted = ", ".join(f"{multiples} for {backend}" for backend, multiples in tables.items())
        return f"[{matrix.rows}, {matrix.columns}] is no multiple of {wanted}"
    if batch <= FEW_ROWS:
        return f"{batch} rows of x: with {FEW_ROWS} or fewer the sparse product is no faster than the dense one"
    return None


def _auctioned(matrix: Matrix) -> str:
    if min(matrix.rows, matrix.columns) < WIDE:
        return f"TensorRT may take a sparse kernel, but NVIDIA saw them win from {WIDE} inputs and outputs on"
    return "TensorRT may take a sparse kernel"


def _tensorrt(matrix: Matrix, batch: int) -> str | None:
    if matrix.dtype not in ("F16", "BF16", "I8", "F8_E4M3"):
        return f"{_dtype(matrix)}: float16, bfloat16, int8 or float8 was wanted"
    if matrix.rows % 8 or matrix.columns % 16:
        return f"[{matrix.rows}, {matrix.columns}] is no multiple of (8, 16)"
    if matrix.negative_zeros:
        return f"{matrix.negative_zeros} zeros are -0.0, which not every kernel takes for zero"
    return None


def _tensorrt_llm(checkpoint: Checkpoint, ranks: int) -> dict[str, str]:
    """By tensor, why TensorRT takes no sparse kernel for the layers that it is part of."""
    found: dict[str, str] = {}
    for layer in eligible(checkpoint, ranks=ranks):
        if not layer.eligible:
            for site in layer.sites:
                found.setdefault(
                    f"{site}.weight", f"{layer.name} on rank {layer.rank}: {layer.reason}"
                )
    return found


_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found (\d+) layer\S* eligible[^:\n]*):?(.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers|Chose (\d+) layer[^:\n]*):?(.*)"
)


def parse_build_log(text: str) -> tuple[SparsityReport, ...]:
    """What TensorRT says of sparsity in a verbose build log, one report each time it does, the
    final engine's last.

    TensorRT 8 gives names, later versions counts and, in some, names. Whatever stands before
    `(Sparsity)` in a line is ignored. Empty where the log says nothing: --weight_sparsity or
    --log_level verbose was missing, or no product reached TensorRT
    (`formats.tensorrt_llm.SILENTLY_DENSE`).
    """
    reports, waiting = [], None
    for line in text.splitlines():
        if found := _ELIGIBLE.search(line):
            waiting = _counted(found)
        elif (found := _PICKED.search(line)) and waiting:
            picked = _counted(found)
            reports.append(SparsityReport(waiting[0], picked[0], waiting[1], picked[1]))
            waiting = None
    return tuple(reports)


def _counted(found: re.Match[str]) -> tuple[int, tuple[str, ...]]:
    names = tuple(name for part in found[2].split(", ") if (name := part.strip(" ,")))
    return int(found[1]) if found[1] else len(names), names


def _dtype(matrix: Matrix) -> str:
    return DTYPES.get(matrix.dtype, matrix.dtype)


_READ = "2026-11-22"
_AUCTION = (
    "A yes means eligible: the builder times sparse against dense and takes the faster, in silence. Look in the "
    "verbose build log for '(Sparsity)', and whether any layer was picked (TensorRT#2169: many eligible, none picked).",
)
_PUBLISHED = (
    "Published for cuSPARSELt 0.8.1 with its best algorithm, bfloat16, linear layers of Qwen2.5-7B on an H100: 1.03 "
    "times as fast as dense at 64 rows of x, 1.13 at 128, 1.25 at 256, 1.43 at 512, 1.74 at 1,024 (arXiv:2603.05232).",
    "One row through torch: 4096 × 4096 in 0.022 ms dense, 0.196 ms sparse (pytorch#111339).",
    "Rows of x are the batch in decoding, batch × tokens in prefill: ask again with a larger batch.",
    "torch does not check the pattern: a matrix that is not 2:4 is converted to a wrong one without an error.",
)

RULES: dict[str, Rule] = {
    "eager": Rule(
        never("torch multiplies by zeros as by other numbers"), "torch 2.13, measured", _READ
    ),
    "compiled": Rule(never("torch.compile fuses, but its products are dense"), "torch 2.13", _READ),
    "packed": Rule(_packed, "kernels/packed.py", "2026-11-26", ("On the CPU, for decoding.",)),
    "packed-int8": Rule(
        _packed,
        "kernels/packed.py",
        "2026-11-26",
        ("On the CPU, for decoding, with weights rounded to int8.",),
    ),
    "semi-structured": Rule(
        _two_of_four(
            _semi_structured,
            lambda matrix: "torch has a 2:4 kernel for it, and x enough rows to gain by it",
        ),
        "torch 2.13, torch/sparse/semi_structured.py",
        _READ,
        _PUBLISHED,
    ),
    "tensorrt-llm": Rule(
        _two_of_four(lambda matrix, batch: None, _auctioned),
        "TensorRT-LLM 1.2.1, builder.py and layers/linear.py; TensorRT-LLM#1559, #1731, #1802, #1913",
        _READ,
        (
            f"Build: {BUILD_COMMAND.replace('{engine}', 'ENGINE')}",
            *(f"Dense in silence with {option}: {why}." for option, why in SILENTLY_DENSE.items()),
            *_AUCTION,
            "TensorRT-LLM 1.3 and later have no engine backend: their PyTorch backend multiplies densely.",
            "Published gains on whole models: none to 5 % (TensorRT-LLM#1731, #1802, Model-Optimizer#1974).",
        ),
        _tensorrt_llm,
        certain=False,
    ),
    "tensorrt": Rule(
        _two_of_four(_tensorrt, _auctioned),
        "TensorRT#2169, #2271, #3849, #4056; alignments of NVIDIA's ASP, since TensorRT publishes none",
        _READ,
        (
            "Build: trtexec --onnx=MODEL.onnx --sparsity=enable --verbose, with constant weights; --sparsity=force "
            "overwrites weights and is for timing only.",
            *_AUCTION,
        ),
        certain=False,
    ),
    "vllm": Rule(
        never(
            "vLLM 0.19.1 and later have no sparse kernels; the checkpoint loads and runs densely"
        ),
        "vllm#32688, #36799",
        _READ,
    ),
    "onnxruntime": Rule(
        never("ONNX Runtime multiplies densely"),
        "ONNX Runtime 1.31, measured with 0, 50 and 90 % zeros",
        _READ,
        (
            "With its TensorRT provider and ORT_TENSORRT_SPARSITY_ENABLE=1 the rules of `tensorrt` hold.",
        ),
    ),
    "llamacpp": Rule(
        never("llama.cpp stores and multiplies zeros like other weights"),
        "llama.cpp#931, #3594",
        _READ,
    ),
}
"""How each runtime treats zeros. A smaller model needs no rule: it is smaller everywhere."""

__all__ = [
    "CONV1D",
    "EXPERTS",
    "LINEAR",
    "MULTIPLES",
    "PRUNED",
    "RULES",
    "Matrix",
    "Rule",
    "SparsityReport",
    "Verdict",
    "parse_build_log",
]
