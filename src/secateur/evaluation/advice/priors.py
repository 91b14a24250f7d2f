"""What is known before anything is measured, in sentences, each with its source and date.

The sentences stand in `deployment/sparsity_support.toml`. What a runtime does with zeros is not
said there again: its rule is asked, for a typical matrix. Every sentence that leaves this file
begins with `LABEL`; none is a figure of the model at hand.
"""

from dataclasses import dataclass

from secateur.deployment.sparsity_support import KNOWN, LINEAR, RULES, RUNTIME_FACTS, Matrix, Rule
from secateur.evaluation.advice.hardware import find_hardware

LABEL = "prior, not measured: "
UNSTRUCTURED, SEMI, STRUCTURED = "unstructured", "semi-structured", "structured"
QUANTISED = "quantised"


@dataclass(frozen=True)
class Prior:
    """One thing that is known of a `kind` of sparsity: the goals, makers of hardware and runtimes
    that it bears on; empty: all.
    """

    kind: str
    goals: list[str]
    says: str
    source: str
    date: str
    makers: list[str] | tuple[()] = ()
    runtimes: list[str] | tuple[()] = ()

    def bears_on(self, maker: str | None, runtime: str | None) -> bool:
        """Whether it is about a runtime and a maker (None: any), and not about others alone."""
        if maker is not None and self.makers and maker not in self.makers:
            return False
        general = not self.runtimes and (maker is not None or not self.makers)
        return runtime is None or runtime in self.runtimes or general


PRIORS = tuple(Prior(**entry) for entry in KNOWN["priors"])
"""The field's priors. A new one is an entry of the file; docs/recommend.md is made from it."""

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


def rule_of(runtime: str) -> Rule | None:
    """The rule of a runtime, or of the one it is alike; None where only priors say something."""
    facts = RUNTIME_FACTS.get(runtime)
    return RULES.get(facts.alike or runtime) if facts else None


def uses_zeros(runtime: str, pattern: str, rows: int = 1) -> bool | None:
    """Whether a runtime's rule lets it use such zeros at so many rows of x; None: no rule."""
    rule = rule_of(runtime)
    return None if rule is None else rule.judge(typical(pattern in TWO_OF_FOUR), rows).used


def known_of(runtime: str, goal: str) -> list[str]:
    """What a runtime's rule says of zeros anywhere and of 2:4, decoding and in prefill."""
    rule = rule_of(runtime)
    if rule is None or goal == "quality":
        return []
    sentences = []
    for zeros, matrix in (("half zeros anywhere", typical(False)), ("2:4", typical(True))):
        verdicts = {"decoding": rule.judge(matrix, 1), "prefill": rule.judge(matrix, PREFILL_ROWS)}
        if verdicts["decoding"] == verdicts["prefill"]:
            verdicts = {"any batch": verdicts["decoding"]}
        for step, (used, reason) in verdicts.items():
            does = "may use them" if used else "does not use them"
            what = f"{zeros}, {step}: {runtime} {does}, {reason}"
            sentences.append(f"{LABEL}{what} ({rule.source}; {rule.date})")
    return sentences


def known_of_hardware(name: str) -> str:
    """What hardware has for 2:4. Raises UnknownName."""
    hardware = find_hardware(name)
    return f"{LABEL}{name} {hardware.says} ({hardware.source}; {hardware.date})"


def priors(goal: str, hardware: str | None = None, runtime: str | None = None) -> list[str]:
    """The sentences that bear on a goal, those of that runtime and hardware first; None: all.

    Raises UnknownName.
    """
    sentences = [] if runtime is None else known_of(runtime, goal)
    if hardware is not None and goal == "latency":
        sentences.append(known_of_hardware(hardware))
    maker = None if hardware is None else find_hardware(hardware).maker
    return sentences + [
        f"{LABEL}{prior.kind}: {prior.says} ({prior.source}; {prior.date})"
        for prior in PRIORS
        if goal in prior.goals and prior.bears_on(maker, runtime)
    ]
