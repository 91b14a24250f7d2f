"""Which families can be made smaller: every tiny model of the tests, with every kind of structure; of those that see
or hear as well the language model.

    python bench/structures.py --json bench/results/families.json

Each is shrunk, written, loaded by the stock loader and compared in logits (in this process, not a fresh one). `held`:
the result loads and is equal, and all that is no language model is what it was to the bit; otherwise the sentence with
which it was refused.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from common import options, write

from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.errors import SecateurError, UnsupportedModel
from secateur.models.load import load
from secateur.models.parts import other_parts
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.pruning.structured import program, verify
from secateur.system.devices import find_resources
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Destination, Recipe, Trust

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.families import FAMILIES, tiny_model
from support.multimodal import MULTIMODAL, tiny_multimodal

PATTERNS = (
    ("25% of channels", "fast"), ("50% of heads", "fast"), ("1 block", "influence"), ("25% of experts", "reap"),
    ("25% of experts", "ream"),
)  # fmt: skip


def check(folder: Path, tokens: torch.Tensor, logits: torch.Tensor, **options: bool) -> None:
    """What `verify` does in a fresh process."""
    if (found := verify.difference(folder, tokens, logits, **options)) > verify.MOST:
        raise UnsupportedModel(f"DIFFERS by {found:.1e}")


def tried(source: Path, out: Path, pattern: str, method: str) -> str:
    """`held`, or why not."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    try:
        opened = Opened(open_checkpoint(source), load(source), Windows(ids, "random", "none", 1, None))
        prune_checkpoint(
            opened,
            find_recipe(Recipe(method=method, pattern=pattern)),
            find_resources(Compute()),
            Destination(out=out, overwrite=True),
            Trust(),
            Progress(),
        )
    except SecateurError as error:
        return str(error)
    before, after = open_checkpoint(source), open_checkpoint(out)
    parts = tuple(f"{part}." for part in other_parts(opened.language_model.model))
    for name in before.places:
        if any(f".{part}" in f".{name}" for part in parts) and not torch.equal(before.tensor(name), after.tensor(name)):
            return f"CHANGED {name}"
    return "held"


if __name__ == "__main__":
    chosen = options(__doc__, dict(json=Path))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    program.refuse_unequal = check
    found: dict[str, dict[str, dict[str, str]]] = {"text": {}, "multimodal": {}}
    made = [("text", tiny_model, family) for family in FAMILIES]
    for kind, make, family in made + [("multimodal", tiny_multimodal, family) for family in MULTIMODAL]:
        said = found[kind][family] = {}
        for pattern, method in PATTERNS:
            with TemporaryDirectory() as temporary:
                source, out = Path(temporary) / "source", Path(temporary) / "out"
                make(family).save_pretrained(source)
                said[f"{pattern}, {method}"] = tried(source, out, pattern, method)
        print(family, " · ".join(f"{name}: {words[:60]}" for name, words in said.items()), flush=True)
    for kind, families in found.items():
        for pattern, method in PATTERNS:
            held = sum(said[f"{pattern}, {method}"] == "held" for said in families.values())
            print(f"{kind}, {pattern} by {method}: held by {held} of {len(families)} families")
    write(chosen.json, text=found["text"], multimodal=found["multimodal"])
