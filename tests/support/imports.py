"""Which modules of the package a file imports, and which room may import which."""

import ast
from pathlib import Path

import secateur

SOURCE = Path(secateur.__file__).parent
LOWER = ("errors", "system", "kernels", "data", "methods", "checkpoints", "models")
MAY_IMPORT = {
    "errors": (),
    "system": ("errors",),
    "kernels": ("errors", "system"),
    "data": ("errors", "system"),
    "methods": ("errors", "system", "kernels"),
    "checkpoints": ("errors", "system"),
    "models": LOWER[:-1],
    "pruning": LOWER,
    "recovery": LOWER,
    "deployment": LOWER,
    "evaluation": (*LOWER, "pruning", "recovery", "deployment"),
    "cli": (*LOWER, "pruning", "recovery", "deployment", "evaluation", "secateur"),
}
"""Every room and the rooms that it may import besides itself; "secateur" is the package's own face."""
APART = [("pruning.planning", "pruning.structured")]
"""Folders inside a room that do not import each other."""
KNOWN_TO_A_METHOD = {
    "errors",
    "methods",
    "methods.base",
    "methods.cost",
    "methods.patterns",
    "methods.statistics",
    "methods.least_squares",
    "methods.column_sweep",
}
"""What a file of `methods` that holds a paper may import."""


def imports(file: Path) -> list[str]:
    """The modules of the package that a file imports, at its top or inside a function: "models.replay"."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "secateur":
            module = node.module.removeprefix("secateur").strip(".")
            for name in (alias.name for alias in node.names):
                inner = f"{module}.{name}".strip(".")
                path = SOURCE / inner.replace(".", "/")
                found.append(inner if path.is_dir() or path.with_suffix(".py").is_file() else module or "secateur")
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "secateur"]
    return found


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own face."""
    files = sorted(file for file in SOURCE.rglob("*.py") if file.parent != SOURCE or not file.stem.startswith("__"))
    names = (file.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".") for file in files)
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}
