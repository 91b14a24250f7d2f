"""What became of the zeros of a pruned checkpoint in one that was made of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import run

import secateur
from secateur.deployment.inspect import Against
from secateur.errors import BadCheckpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "pruned"
    secateur.prune(
        tiny_llama, method="magnitude", pattern="2:4", out=out, calibration=str(text_file), samples=2, seq_len=16
    )
    return out


def made_of(pruned: Path, out: Path) -> Path:
    """The checkpoint again, in which five pruned weights of a matrix came back and seven kept ones became zero."""
    out.mkdir()
    for file in pruned.iterdir():
        if file.suffix == ".json" and file.name != "pruning.json":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(pruned / "model.safetensors")
    weight = tensors[NAME].flatten()
    gone, kept = (weight == 0).nonzero(), (weight != 0).nonzero()
    weight[gone[:5]], weight[kept[9:16]] = 0.01, -0.0
    tensors[NAME] = weight.view_as(tensors[NAME])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_zeros_are_held_against_those_of_a_pruned_checkpoint(pruned, tmp_path):
    found = secateur.inspect(made_of(pruned, tmp_path / "made"), against=pruned)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    half = tensors[NAME].shape[0] * tensors[NAME].shape[1] // 2
    assert tensors[NAME].against == Against(pruned=half, came_back=5, kept=half, vanished=7)
    others = [tensor.against for name, tensor in tensors.items() if name != NAME]
    assert all(one is not None and (one.came_back, one.vanished) == (0, 0) for one in others)
    zeros = sum(int((load_file(pruned / "model.safetensors")[name] == 0).sum()) for name in tensors)
    assert found.against == Against(pruned=zeros, came_back=5, kept=zeros, vanished=7)


def test_the_command_line_says_it(pruned, tmp_path):
    made = made_of(pruned, tmp_path / "made")
    said = " ".join(run("inspect", made, "--against", pruned).split())
    assert "5 came back" in said
    assert "7 became zero" in said
    document = json.loads(run("inspect", made, "--against", pruned, "--json"))
    assert document["against"]["came_back"] == 5
    assert "came back" not in run("inspect", made)


def test_another_model_is_refused(pruned, tiny_mixtral, tmp_path):
    with pytest.raises(BadCheckpoint, match=r"cannot be held against .* no such tensor"):
        secateur.inspect(pruned, against=tiny_mixtral)
    other = made_of(pruned, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[NAME] = torch.zeros(4, 4)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"which has .*up_proj.weight \[4, 4\]"):
        secateur.inspect(pruned, against=other)
