"""Draft heads: never lost or falsified in silence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_model
from support.texts import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from secateur.errors import BadCheckpoint, BadPattern, UnknownName, UnsupportedModel
from secateur.models.load import load

BEHIND = "model.layers.{blocks}."
FAMILIES = {"glm4_moe": BEHIND, "deepseek_v3": BEHIND, "qwen3_next": "mtp.layers.0."}
"""By model type: where its checkpoints hold the draft head."""


def with_draft_head(family: str, folder: Path, count: int = 1) -> Path:
    model = tiny_model(family)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = FAMILIES[family].format(blocks=model.config.num_hidden_layers)
    head = {f"{prefix}{name}": torch.randn(8, 8) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")}
    save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": count}))
    return folder


@pytest.fixture
def run(text_file, tmp_path):
    def prune(folder: Path, **options):
        given = {"calibration": str(text_file), "samples": 4, "seq_len": 16, "out": tmp_path / "out", **options}
        return secateur.prune(folder, **given)

    return prune


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_leave_draft_heads_as_they_are_and_say_so(family, run, tmp_path):
    source = with_draft_head(family, tmp_path / "source")
    ignored = load(source).ignored
    assert len(ignored) == 2
    report = run(source, method="wanda")
    assert "(2 tensors)" in report.note
    before, after = (load_file(folder / "model.safetensors") for folder in (source, report.out))
    assert all(torch.equal(before[name], after[name]) for name in ignored)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_structure_refuses_them_or_drops_them(family, run, tmp_path):
    source = with_draft_head(family, tmp_path / "source")
    ignored = load(source).ignored
    with pytest.raises(UnsupportedModel, match=r"has draft heads .* and 1 more tensors.*--draft-heads drop"):
        run(source, method="fast", pattern="1 block")
    assert not (tmp_path / "out").exists()
    report = run(source, method="fast", pattern="1 block", draft_heads="drop")
    assert report.removed["draft heads"] == "2 tensors"
    assert not set(ignored) & load_file(report.out / "model.safetensors").keys()
    assert json.loads((report.out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert AutoConfig.from_pretrained(report.out).num_hidden_layers == report_blocks(report.out)


def report_blocks(folder: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return len(model.model.layers)


def test_blocks_that_no_draft_head_explains_are_still_refused(tmp_path):
    source = with_draft_head("deepseek_v3", tmp_path / "source", count=0)
    with pytest.raises(BadCheckpoint, match="it has besides"):
        load(source)


def test_what_to_do_with_them_is_for_structures(run, tiny_llama):
    with pytest.raises(BadPattern, match="--draft-heads drop is for structures"):
        run(tiny_llama, draft_heads="drop")
    with pytest.raises(UnknownName, match="way with draft heads"):
        run(tiny_llama, pattern="1 block", draft_heads="keep")
