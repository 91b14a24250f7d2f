"""The demo: a small language model of our own and the text it was trained on, with no download.

Every Python installation carries several megabytes of code and prose: the sources of the standard
library, docstrings included, and the language reference in `pydoc_data.topics`. The embedded model
(`model_folder()`) was trained on that text by `bench/train_demo.py`, and is calibrated and judged
on parts of it that it never saw. No text is shipped: it is read from the running interpreter, so a
different Python version gives slightly different parts, and the calibration fingerprint says so.

A document belongs to exactly one part, chosen by a hash of its name (`part_of`), for good: a module
that a later Python adds falls into its own place and moves no other one. Test packages are missing
from many installations, so they serve for training only; `encodings` is left out (tables of
numbers, not text).
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path

PARTS = ("training", "calibration", "evaluation")
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LEFT_OUT = {"site-packages", "dist-packages", "encodings", "__pycache__", "lib-dynload"}


def model_folder() -> Path:
    """The embedded model: a Hugging Face folder (config, tokenizer, bf16 safetensors)."""
    return Path(str(files(__name__))) / "model"


def part_of(name: str) -> str:
    """The part of a document, by hash: 2/16 calibration, 2/16 evaluation, the rest training."""
    slot = hashlib.sha256(f"secateur demo 1 {name}".encode()).digest()[0] % 16
    return "evaluation" if slot < 2 else "calibration" if slot < 4 else "training"


@cache
def documents(part: str) -> tuple[str, ...]:
    """The texts of one part of the standard library, in a fixed order that mixes the packages.

    Raises ValueError for a name that is not in `PARTS`.
    """
    if part not in PARTS:
        raise ValueError(f"the demo text has the parts {', '.join(PARTS)}; found {part!r}")
    topics = import_module("pydoc_data.topics").topics  # what `help()` shows of the language
    named = (*_modules(part), *((f"pydoc_data.topics/{name}", topics[name]) for name in topics))
    chosen = {name: text for name, text in named if part_of(name) == part}
    order = {name: hashlib.sha256(f"order {name}".encode()).digest() for name in chosen}
    return tuple(chosen[name] for name in sorted(chosen, key=order.__getitem__))


def _modules(part: str) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of the standard library that this part may use."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        folders = set(path.relative_to(library).parts[:-1])
        if folders & _LEFT_OUT or path.name == "topics.py":
            continue
        if folders & _TEST_FOLDERS and part != "training":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of sources are in other encodings on purpose
            continue
        if text.strip():
            yield ".".join(path.relative_to(library).with_suffix("").parts), text
