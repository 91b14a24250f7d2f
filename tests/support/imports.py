"""Which modules of the package a file imports, and in which order they stand."""

import ast
from pathlib import Path

import secateur

SOURCE = Path(secateur.__file__).parent
LAYERS = [
    ["errors", "machine", "demo", "commands.arguments", "native"],
    ["progress", "files", "gram", "advice.hardware", "comparison.draw"],
    ["commands.terminal", "corpora"],
    ["structures", "stats", "experts", "checkpoint", "data", "packed", "journal", "interrupt", "masks", "items"],
    ["place"],
    ["patterns", "solve", "sites", "refusals", "watch", "packing", "hidden", "output", "replay"],
    ["kernels", "restack", "harness"],
    ["sweep"],
    ["methods", "model", "repair", "selection", "tasks"],
    ["suspend", "ahead"],
    ["ranks"],
    ["flow"],
    ["gather"],
    ["allocate", "options", "stream", "inspection", "trace", "stock", "layout", "taylor", "reap", "cost"],
    ["record", "refine", "trial", "evaluate", "comparison.results", "units", "verify", "meta"],
    ["formats", "outline", "advice.measured", "comparison.sheets", "comparison.sound"],
    ["export", "rules", "comparison.store", "comparison.charts"],
    ["comparison.page", "advice.priors"],
    ["runtimes"],
    ["validate", "doctor"],
    ["bench", "layers", "advice.goals", "advice.measure"],
    ["commands.tables"],
    ["permute", "search", "comparison.report", "cut", "depth"],
    ["survey", "block", "plan"],
    ["shrunk", "budget", "footprint"],
    ["shrink"],
    ["decide"],
    ["comparison.grid", "recovery.text", "recovery.lora", "recovery.write", "recovery.checks", "recovery.halfway"],
    ["recovery.job"],
    ["recovery.training", "recovery.blocks"],
    ["recovery.whole"],
    ["recovery.recover"],
    ["forecast"],
    ["prune"],
    ["comparison.recovering"],
    ["comparison.rows"],
    ["comparison.latency", "comparison.ranking", "comparison.tolerance", "comparison.answers"],
    ["comparison.compare", "comparison.join", "advice.recommend"],
    ["__init__"],
    ["commands.deploy", "commands.recover", "commands.advice", "commands.study"],
    ["commands.cli"],
    ["__main__"],
]
SPLIT = ("comparison", "advice", "commands", "recovery")
"""Packages whose modules have a layer each; the others are one layer as a whole."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOWN_TO_A_METHOD = {"methods", "patterns", "stats", "solve", "sweep", "errors"}
"""What a file of `methods` may import."""


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "secateur":
            parts = node.module.split(".")
            if parts[1:] and parts[1] in SPLIT:
                found |= {".".join(parts[1:3])} if parts[2:] else {f"{parts[1]}.{a.name}" for a in node.names}
            else:
                found |= {parts[1]} if parts[1:] else {a.name if a.name in LEVEL else "__init__" for a in node.names}
        if isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name == "secateur"}
    return found
