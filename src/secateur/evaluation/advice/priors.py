"""What is known before anything is measured: a sentence an entry, each with its source and date.

What a runtime does with zeros is not said here again: it is asked of `sparsity_support`, for a
typical matrix. Every sentence that leaves this file begins with `LABEL`; none is a figure of the
model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.deployment.sparsity_support import LINEAR, RULES, Matrix
from secateur.evaluation.advice.hardware import find_hardware

LABEL = "prior, not measured: "
UNSTRUCTURED, SEMI, STRUCTURED = "unstructured", "semi-structured", "structured"


@dataclass(frozen=True)
class Prior:
    """One thing that is known: `kind` of sparsity, the goals it bears on, makers of hardware and
    runtimes that it is about (empty: all).
    """

    kind: str
    goals: tuple[str, ...]
    says: str
    source: str
    date: str
    makers: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()


_ALL = ("quality", "latency", "memory", "portability")
_SPEED = ("latency",)
_GPU = ("nvidia", "amd")

PRIORS: tuple[Prior, ...] = (
    Prior(
        UNSTRUCTURED,
        ("quality",),
        "zeros anywhere lose least: LLaMA-7B has 5.68 dense, Wanda 7.26 at 50 %, 11.53 at 2:4 on WikiText-2",
        "Sun et al. 2024, arXiv:2306.11695",
        "2026-11-22",
    ),
    Prior(
        SEMI,
        ("quality",),
        "2:4 loses more than as many zeros anywhere, with every method tried on the demo model",
        "README.md",
        "2026-11-26",
    ),
    Prior(
        STRUCTURED,
        ("quality",),
        "removing channels, heads or blocks loses most for what it removes",
        "docs/structured.md",
        "2026-11-26",
    ),
    Prior(
        UNSTRUCTURED,
        ("memory",),
        "zeros in a plain checkpoint save no bytes; at 50 % in 16 bits a bitmap and the kept values take 56 % of them, "
        "36 % at 70 %, and only secateur.load_packed reads that",
        "docs/deploying.md",
        "2026-11-26",
    ),
    Prior(
        SEMI,
        ("memory", "portability"),
        "no current loader reads the compressed 2:4 formats: compressed-tensors dropped them in 0.15 (2026-03-17), "
        "transformers on 2026-06-02; a plain checkpoint with 2:4 zeros is as large as the dense one",
        "compressed-tensors#610, transformers#46342",
        "2026-11-22",
    ),
    Prior(
        STRUCTURED,
        _ALL[1:],
        "a smaller dense model is smaller and faster everywhere, and loads in every runtime that loads the dense one",
        "docs/structured.md, docs/speed.md",
        "2026-11-26",
    ),
    Prior(
        UNSTRUCTURED,
        ("portability",),
        "a plain checkpoint with zeros, anywhere or 2:4, loads everywhere; transformers, vLLM, llama.cpp and ONNX "
        "Runtime then multiply by the zeros as by other numbers",
        "docs/deploying.md, sparsity_support.py",
        "2026-11-26",
    ),
    Prior(
        UNSTRUCTURED,
        ("latency", "memory"),
        "50 % zeros in 16 bits are worth no more than eight-bit values without zeros",
        "docs/speed.md",
        "2026-11-26",
    ),
    Prior(
        UNSTRUCTURED,
        _SPEED,
        "zeros anywhere give speed only with kernels made for them: `packed` of this package, decoding on CPUs; "
        "DeepSparse, which had them, ended in June 2025",
        "docs/deploying.md, sparseml#2222",
        "2026-11-26",
        ("processor", "apple"),
    ),
    Prior(
        UNSTRUCTURED,
        _SPEED,
        "no stock server on a GPU has kernels for zeros anywhere",
        "docs/deploying.md",
        "2026-11-26",
        _GPU,
    ),
    Prior(
        SEMI,
        _SPEED,
        "2:4 needs sparse tensor cores, NVIDIA's Ampere (compute capability 8.0) or later, and a runtime with kernels",
        "docs.nvidia.com/cuda/cusparselt",
        "2026-11-27",
        _GPU,
        ("semi-structured", "tensorrt", "tensorrt-llm", "vllm"),
    ),
    Prior(
        SEMI,
        _SPEED,
        "on MI300 2:4 goes through hipSPARSELt of ROCm, torch 2.9 and later: 1.2 times as fast on average",
        "pytorch#150578",
        "2026-11-22",
        ("amd",),
        ("semi-structured",),
    ),
    Prior(
        SEMI,
        _SPEED,
        "2:4 in `packed` on CPUs costs what 50 % zeros anywhere cost",
        "docs/speed.md",
        "2026-11-26",
        ("processor", "apple"),
        ("packed", "packed-int8"),
    ),
    Prior(
        SEMI,
        _SPEED,
        "vLLM 0.8 to 0.18 had kernels for 2:4, removed in March 2026; those for 2:4 in four bits in January 2026",
        "vllm#36799, vllm#32688",
        "2026-11-22",
        _GPU,
        ("vllm",),
    ),
    Prior(
        SEMI,
        _SPEED,
        "TensorRT-LLM up to 1.2.1 can use 2:4; the engine backend that does was removed in July 2026, and the PyTorch "
        "backend multiplies densely",
        "TensorRT-LLM#15763, #15767",
        "2026-11-22",
        ("nvidia",),
        ("tensorrt-llm",),
    ),
    Prior(
        SEMI,
        _SPEED,
        "TensorRT still has kernels for 2:4 (--sparsity=enable), and its builder takes them where they win",
        "TensorRT#2169, #3849",
        "2026-11-22",
        ("nvidia",),
        ("tensorrt",),
    ),
    Prior(
        SEMI,
        _SPEED,
        "torch 2.13 still has 2:4 products, as a prototype; so has torchao 0.18.0, which removed them on 2026-08-11",
        "torch/sparse/semi_structured.py, ao#4727",
        "2026-11-22",
        _GPU,
        ("semi-structured",),
    ),
    Prior(
        SEMI,
        _SPEED,
        "torch's 2:4 products are 1.3 to 1.5 times as fast on an H200 from 1,024 rows of activations on, and slower "
        "for few",
        "docs/speed.md",
        "2026-11-27",
        ("nvidia",),
        ("semi-structured",),
    ),
    Prior(
        UNSTRUCTURED,
        _SPEED,
        "our kernels for zeros on GPUs make single products of one row up to 1.3 times as fast on an H200, 2:4 up to "
        "1.8 times; in transformers, which launches kernel by kernel, the demo model decoded no faster with them",
        "docs/speed.md",
        "2026-11-27",
        _GPU,
        ("packed-cuda",),
    ),
    Prior(
        UNSTRUCTURED,
        _SPEED,
        "the dense products of this package multiply by zeros as by other numbers",
        "packed.py",
        "2026-11-26",
        ("processor", "apple"),
        ("own-dense", "own-int8"),
    ),
)
"""The field's priors. A new one is an entry here and a line in docs/recommend.md, which is held
equal by a test.
"""

ALIKE: Mapping[str, str] = {"eager-cuda": "eager", "llamacpp-q8": "llamacpp"}
"""Runtimes that do with zeros what another one does, which has the rule."""

TWO_OF_FOUR = ("2:4", "1:4", "1:2")
"""Patterns that are 2:4 to a kernel; other N:M are zeros anywhere to it."""

PREFILL_ROWS = 2048
"""Rows of x in the prefill of a prompt of that many tokens."""


def typical(two_of_four: bool) -> Matrix:
    """A matrix of the size of Llama-2-7B's, bfloat16, half of it zeros: 2:4, or anywhere.

    Of groups of four with zeros anywhere (4 choose 3) + 1 of 16 keep more than two weights.
    """
    crowded = 0.0 if two_of_four else 5 / 16
    return Matrix("a matrix", LINEAR, "BF16", 4096, 4096, 0.5, crowded, crowded or 5 / 16, 0, 0)


def rule_of(runtime: str) -> str | None:
    """The name of the rule in `RULES` that holds for a runtime, None where the priors alone say
    something.
    """
    name = ALIKE.get(runtime, runtime)
    return name if name in RULES else None


def uses_zeros(runtime: str, pattern: str, rows: int = 1) -> bool | None:
    """Whether a runtime's rule says that it may use such zeros at so many rows of x; None where
    there is no rule.
    """
    name = rule_of(runtime)
    return None if name is None else RULES[name].judge(typical(pattern in TWO_OF_FOUR), rows).used


def known_of(runtime: str, goal: str) -> list[str]:
    """What the rules say of a runtime, for zeros anywhere and for 2:4, decoding and where it
    differs in prefill.
    """
    name = rule_of(runtime)
    if name is None or goal == "quality":
        return []
    rule, said = RULES[name], []
    for kind, title in ((UNSTRUCTURED, "half zeros anywhere"), (SEMI, "2:4")):
        steps = {
            "decoding": rule.judge(typical(kind == SEMI), 1),
            "prefill": rule.judge(typical(kind == SEMI), PREFILL_ROWS),
        }
        if steps["decoding"] == steps["prefill"]:
            steps = {"any batch": steps["decoding"]}
        for step, (used, reason) in steps.items():
            verdict = "may use them" if used else "does not use them"
            said.append(
                f"{LABEL}{title}, {step}: {runtime} {verdict}, {reason} ({rule.source}; {rule.date})"
            )
    return said


def known_of_hardware(name: str) -> str:
    """What hardware has for 2:4. Raises UnknownName."""
    held = find_hardware(name)
    return f"{LABEL}{name} {held.says} ({held.source}; {held.date})"


def priors(goal: str, hardware: str | None = None, runtime: str | None = None) -> list[str]:
    """The sentences that bear on a goal, what is known of that runtime and hardware first; None:
    all. UnknownName.
    """
    said = [] if runtime is None else known_of(runtime, goal)
    if hardware is not None and goal == "latency":
        said.append(known_of_hardware(hardware))
    maker = None if hardware is None else find_hardware(hardware).maker
    return said + [
        f"{LABEL}{prior.kind}: {prior.says} ({prior.source}; {prior.date})"
        for prior in PRIORS
        if goal in prior.goals and _bears(prior, maker, runtime)
    ]


def _bears(prior: Prior, maker: str | None, runtime: str | None) -> bool:
    """Whether a prior is about a runtime on hardware of a maker; what names other runtimes or
    makers is not.
    """
    if maker is not None and prior.makers and maker not in prior.makers:
        return False
    if runtime is None:
        return True
    return runtime in prior.runtimes or (
        not prior.runtimes and (maker is not None or not prior.makers)
    )
