"""The commands that measure what a comparison lacks.

The same comparison again keeps its rows and adds what is missing, so its own command with more in
it is enough.
"""

import shlex
from collections.abc import Sequence

from secateur.deployment.runtimes import RUNTIMES
from secateur.deployment.sparsity_support import RULES
from secateur.evaluation.advice.hardware import find_hardware, is_measured
from secateur.evaluation.results.schema import Results, Row

START = ("--methods", "default", "--patterns", "50%,2:4,25% of channels")
"""A comparison of one row of each kind, where there is none yet."""
USUAL = {True: ("eager-cuda", "semi-structured"), False: ("eager", "packed")}
"""Runtimes to time in where none was asked for: on an accelerator, on a processor."""
CALIBRATION = ("--calibration source", "--samples samples", "--seq-len length", "--seed seed")
EVALUATION = ("--evaluation source", "--windows samples")
"""Options, each with the field of a text that has its value."""


def measuring(
    results: Results | None, runtimes: Sequence[str], hardware: str | None, *, timed: bool = True
) -> list[str]:
    """What to type, quoted for a shell: a comparison that times its rows in runtimes (none: the
    usual ones).

    `timed`: whether times are wanted where no runtime was asked for. For hardware other than that
    of the comparison another folder is named, since rows of two machines do not go into one. A
    runtime that this package cannot drive is asked what it would do, and built by its own command.
    """
    if foreign := [name for name in runtimes if name not in RUNTIMES]:
        return [command for name in foreign for command in _foreign(name)]
    accelerated = hardware is not None and find_hardware(hardware).maker in ("nvidia", "amd")
    wanted = list(runtimes) or (list(USUAL[accelerated]) if timed else [])
    if results is None:
        typed = ["secateur", "compare", "MODEL", *START, *_listed("--bench", wanted)]
        return [shlex.join([*typed, "--out", "OUT"])]
    was_typed = results.command[:2] == ["secateur", "compare"]
    typed, before = _without(results.command if was_typed else _from_rows(results), "--bench")
    typed, out = _without(typed, "--out")
    there = hardware is None or any(is_measured(hardware, results.machine, name) for name in wanted)
    benched = [*(before.split(",") if before and there else []), *wanted]
    folder = (out or "OUT") + ("" if there else f"-{hardware}")
    return [shlex.join([*typed, *_listed("--bench", benched), "--out", folder])]


def tasks_of(results: Results, row: Row) -> str:
    """The command that measures accuracy of a row on tasks beside the dense model."""
    name = str(results.model["name"])
    _, out = _without(results.command, "--out")
    dense = [] if name == "demo" else ["--dense", name]
    folder = f"{out or 'OUT'}/{row.checkpoint}"
    return shlex.join(["secateur", "evaluate", folder, *dense, "--tasks", "papers"])


def _foreign(runtime: str) -> list[str]:
    """What to type for a runtime that has a rule and is not driven by this package."""
    rule = RULES[runtime]
    return [
        f"secateur validate CHECKPOINT --for {runtime}",
        f"secateur export CHECKPOINT --to {rule.export} --out EXPORTED",
        rule.build.format(folder="EXPORTED").replace("MODEL.onnx", "EXPORTED/model.onnx"),
    ]


def _from_rows(results: Results) -> list[str]:
    """The command of a comparison that was not typed: its rows and texts; else defaults."""
    pruned, name = results.pruned, str(results.model["name"])
    shared = any(row.allocation != "uniform" for row in pruned)
    rounded = any(row.values != "as stored" for row in pruned)
    options = [
        *_listed("--methods", [row.method for row in pruned]),
        *_listed("--patterns", [row.pattern for row in pruned]),
        *_listed("--allocate", [row.allocation for row in pruned if shared]),
        *_listed("--values", [row.values for row in pruned if rounded]),
        *_listed("--recover", [row.recovered.way for row in pruned if row.recovered]),
        *_listed("--recover-steps", [str(row.recovered.steps) for row in pruned if row.recovered]),
    ]
    texts = ((results.calibrations[0], CALIBRATION), (results.evaluation, EVALUATION))
    for text, names in texts:
        for option, field in map(str.split, names):
            if text.get(field) is not None:
                options += [option, str(text[field])]
    return ["secateur", "compare", *([] if name == "demo" else [name]), *options]


def _listed(option: str, values: Sequence[str]) -> list[str]:
    """An option with its values, each once; nothing where there are none."""
    return [option, ",".join(dict.fromkeys(values))] if values else []


def _without(typed: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """A command without an option, and the value that it had last."""
    kept, value = list[str](), None
    parts = iter(typed)
    for part in parts:
        if part == option:
            value = next(parts, None)
        elif part.startswith(f"{option}="):
            value = part.removeprefix(f"{option}=")
        else:
            kept.append(part)
    return kept, value
