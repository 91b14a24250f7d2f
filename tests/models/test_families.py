"""Every family that transformers has a tiny config for: found, replayed, pruned, written, reloaded by stock code.

The generic rules of model.py and experts.py are guarded here and nowhere else; a family that they do not fit
must be refused with its reason, never pruned in part.
"""

from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, tiny_model
from support.pruning import prune_opened
from transformers import AutoModelForCausalLM

from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.record import UNSEEN
from secateur.data.windows import Windows
from secateur.deployment.inspect import inspect
from secateur.errors import UnsupportedModel
from secateur.models.load import load, replayable
from secateur.pruning.in_memory import prune_model

REFUSED = {
    "jetmoe": "Only 3.9% of the block weights of JetMoeForCausalLM are prunable matrices",
    "llama4_text": "Only 27.4% of the block weights of Llama4ForCausalLM are prunable matrices",
    "longcat_flash": "Only 52.4% of the block weights of LongcatFlashForCausalLM are prunable matrices",
    "zamba": "ZambaForCausalLM shares weights between its blocks",
    "zamba2": "Zamba2ForCausalLM shares weights between its blocks",
}
READ_DIRECTLY = {"mamba": "dt_proj", "falcon_mamba": "dt_proj", "jamba": "dt_proj"}
"""Linear layers whose weight is read without calling them: they see no token, and stay dense."""

pytestmark = pytest.mark.filterwarnings("ignore")  # each family warns about itself in its own way


def windows() -> Windows:
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    return Windows(ids, "random", "none", 1, None)


def test_there_are_enough_families():
    assert len(set(FAMILIES) - set(REFUSED)) >= 80


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(REFUSED)))
def test_family_is_pruned_to_half_of_every_site_and_reloads(family: str, tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model(family).save_pretrained(source)
    tokens = windows().ids[:2]
    arguments = {"method": "wanda", "pattern": "2:4", "batch_size": 3}

    checkpoint = open_checkpoint(source)
    report = prune_opened(checkpoint, load(source), windows(), out, **arguments)
    assert report.coverage >= 0.95
    unseen = {site.site.rsplit(".", 1)[-1] for site in report.sites if site.note == UNSEEN}
    assert unseen == ({READ_DIRECTLY[family]} if family in READ_DIRECTLY else set())
    assert all(site.sparsity == 0.5 for site in report.sites if site.note != UNSEEN)

    in_memory = load(source)
    prune_model(in_memory, windows(), **arguments)
    with torch.no_grad():
        expected = in_memory.model(tokens, use_cache=False).logits
        stock = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert torch.equal(stock(tokens, use_cache=False).logits, expected)

    found = inspect(out)
    assert found.coverage == pytest.approx(report.coverage)
    assert sum("2:4" in tensor.patterns for tensor in found.tensors) >= len(found.tensors) - 4 * len(unseen)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_family_that_the_rules_do_not_fit_is_refused(family: str):
    with pytest.raises(UnsupportedModel, match=REFUSED[family]):
        prune_model(replayable(tiny_model(family)), windows(), pattern="2:4")
