"""Which families can be made smaller: every tiny model of the tests, with every kind of structure.

    python bench/structures.py --json bench/results/families.json

Each is shrunk, written, loaded by the stock loader and compared in logits (in this process, not a fresh one). `held`:
the result loads and is equal; otherwise the sentence with which it was refused.
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
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.pruning.structured import program, verify
from secateur.system.devices import find_resources
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Destination, Recipe, Trust

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.families import FAMILIES, tiny_model

PATTERNS = {"25% of channels": "fast", "50% of heads": "fast", "1 block": "influence", "25% of experts": "reap"}


def check(folder: Path, tokens: torch.Tensor, logits: torch.Tensor, **options: bool) -> None:
    """What `verify` does in a fresh process."""
    if (found := verify.difference(folder, tokens, logits, **options)) > verify.MOST:
        raise UnsupportedModel(f"DIFFERS by {found:.1e}")


def tried(source: Path, out: Path, pattern: str, method: str) -> str:
    """`held`, or why not."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    opened = Opened(open_checkpoint(source), load(source), Windows(ids, "random", "none", 1, None))
    try:
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
    return "held"


if __name__ == "__main__":
    chosen = options(__doc__, dict(json=Path))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    program.refuse_unequal = check
    found: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        with TemporaryDirectory() as temporary:
            source = Path(temporary) / "source"
            tiny_model(family).save_pretrained(source)
            found[family] = {p: tried(source, Path(temporary) / "out", p, m) for p, m in PATTERNS.items()}
        print(family, " · ".join(f"{p}: {said[:60]}" for p, said in found[family].items()), flush=True)
    for pattern in PATTERNS:
        held = sum(said[pattern] == "held" for said in found.values())
        print(f"{pattern}: held by {held} of {len(found)} families")
    write(chosen.json, families=found)
