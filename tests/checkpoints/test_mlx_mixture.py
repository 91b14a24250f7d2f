"""A mixture of experts as mlx-lm writes it: the experts of a block in one array for each matrix, under `switch_mlp`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import tiny_model
from support.texts import byte_tokenizer
from torch import Tensor

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised.formats import plain_source
from secateur.errors import BadCheckpoint

GROUP = 32
OTHER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def packed(name: str, dense: Tensor) -> dict[str, Tensor]:
    """Numbers of 8 bits, four to a word, the first in its lowest byte, each group between its ends."""
    groups = dense.float().unflatten(-1, (-1, GROUP))
    biases = groups.amin(-1)
    scales = ((groups.amax(-1) - biases) / 255).clamp(min=1e-6)
    numbers = ((groups - biases[..., None]) / scales[..., None]).round().clamp(0, 255).to(torch.uint8).flatten(-2)
    dense.copy_((numbers.float().unflatten(-1, (-1, GROUP)) * scales[..., None] + biases[..., None]).flatten(-2))
    words = numbers.contiguous().view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": biases}


def mixture(family: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder of mlx-lm, and the plain tensors that it stands for."""
    model: Any = tiny_model(family)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    plain = {name: checkpoint.tensor(name).clone() for name in checkpoint.places}
    stored = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    inside = "mlp" if family != "mixtral" else "block_sparse_moe"
    for block in range(model.config.num_hidden_layers):
        for matrix, other in OTHER.items():
            last = matrix if family != "mixtral" else other
            names = [
                f"model.layers.{block}.{inside}.experts.{expert}.{last}.weight"
                for expert in range(model.config.num_local_experts)
            ]
            together = torch.stack([plain[name] for name in names])
            stored |= packed(f"model.layers.{block}.{inside}.switch_mlp.{matrix}", together)
            plain |= dict(zip(names, together, strict=True))
    name = "model.layers.0.self_attn.q_proj"
    stored |= packed(name, plain[f"{name}.weight"])
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"bits": 8, "group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, plain


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_taken_apart(family, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    folder, plain = mixture(family, tmp_path / "mlx")
    source = plain_source(folder)
    assert source is not None
    read = {tensor.name: tensor for tensor in source.tensors}
    assert read.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(read[name].read(), tensor, rtol=0, atol=1e-6, msg=name)
    assert source.stored_bytes == sum(place.bytes for place in open_checkpoint(folder).places.values())
    report = secateur.prune(
        folder, out=tmp_path / "out", method="wanda", pattern="2:4", calibration=str(text_file), samples=4, seq_len=16
    )
    assert report.out
    assert "Read from MLX 8-bit, groups of 32." in report.note
    assert {tensor.name for tensor in secateur.inspect(report.out).tensors} <= plain.keys()


def test_an_array_that_is_cut_short_is_refused(tmp_path):
    folder, _ = mixture("qwen3_moe", tmp_path / "mlx")
    checkpoint = open_checkpoint(folder)
    stored = {name: checkpoint.tensor(name).clone() for name in checkpoint.places}
    name = "model.layers.1.mlp.switch_mlp.up_proj.scales"
    save_file({**stored, name: stored[name][:2].clone()}, folder / "model.safetensors")
    with pytest.raises(
        BadCheckpoint, match=r"switch_mlp\.up_proj .* has scales of shape \[2, 64, 2\]; \[4, 64, 2\] was"
    ):
        plain_source(folder)
