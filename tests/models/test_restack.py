"""Experts that the loader stacks lie in a file where memory is short, and nothing else changes."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.errors import DiskFull
from secateur.models import mapped_experts as restack
from secateur.models.load import load
from secateur.models.mapped_experts import spill_folder, too_large


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(restack, "SMALL", 1)


def file_of(tensor: Tensor) -> str:
    """What the system has mapped where a tensor lies; empty for memory of our own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split(maxsplit=5) if len(line.split()) > 5 else (*line.split(), "")
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < end:
            return "" if last.startswith("[") else last
    return ""


def test_stacked_experts_lie_in_a_file_without_a_name(tiny_mixtral, tmp_path):
    held, spilled = load(tiny_mixtral), load(tiny_mixtral, spill=tmp_path)
    assert (held.spilled, spilled.spilled) == (False, True)
    assert list(tmp_path.iterdir()) == []
    moved = 0
    for (name, one), (_, other) in zip(held.model.named_parameters(), spilled.model.named_parameters(), strict=True):
        assert torch.equal(one, other)
        stacked = ".experts." in name
        moved += stacked
        assert file_of(other).startswith(f"{tmp_path}/") == stacked, name
        assert ("(deleted)" in file_of(other)) == stacked
    assert moved == 2 * len(held.blocks)


def test_a_model_that_is_not_stacked_stays_the_mapped_checkpoint(tiny_llama, tmp_path):
    weight = load(tiny_llama, spill=tmp_path).model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert file_of(weight).endswith("model.safetensors")


def test_the_result_is_the_same(tiny_mixtral, text_file, tmp_path, monkeypatch):
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "passes": "two", "batch_size": 1}
    folders = []
    real = restack.stacked_on_disk
    monkeypatch.setattr(
        "secateur.models.load.stacked_on_disk", lambda folder: (folders.append(folder), real(folder))[1]
    )
    secateur.prune(tiny_mixtral, out=tmp_path / "held", **options)
    secateur.prune(tiny_mixtral, out=tmp_path / "spilled", memory=0, **options)
    assert folders == [None, tmp_path]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "spilled"))
    assert one == other


def test_the_first_releases_return_errors_too(tiny_mixtral, tmp_path, monkeypatch):
    """In transformers 5.0 what is converted comes in a tuple; the loader of the release here wants it alone."""
    real: Any = restack.WeightConverter.convert
    monkeypatch.setattr(restack.WeightConverter, "convert", lambda *args, **options: (real(*args, **options), {}))
    with restack.stacked_on_disk(tmp_path):
        wrapped: Any = restack.WeightConverter.convert
        monkeypatch.setattr(restack.WeightConverter, "convert", lambda *args, **options: wrapped(*args, **options)[0])
        weight = load(tiny_mixtral).model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
        assert file_of(weight).startswith(f"{tmp_path}/")


def test_every_load_of_a_comparison_spills_where_the_first_does(tiny_mixtral, text_file, tmp_path, monkeypatch):
    folders = []
    real = restack.stacked_on_disk
    monkeypatch.setattr(
        "secateur.models.load.stacked_on_disk", lambda folder: (folders.append(folder), real(folder))[1]
    )
    secateur.compare(
        tiny_mixtral, out=tmp_path / "out", methods=["magnitude"], patterns=["50%"], values=["as stored", "int8"],
        calibration=str(text_file), evaluation=str(text_file), samples=2, windows=2, seq_len=16, memory=0,
    )  # fmt: skip
    assert len(folders) == 3
    assert all(folder and folder.is_relative_to(tmp_path) for folder in folders)


def test_a_full_disk_is_said(tiny_mixtral, tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull, match="The disk filled up"):
        load(tiny_mixtral, spill=tmp_path)


def test_a_load_that_names_no_folder_spills_where_memory_is_short(tiny_mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr(restack, "gettempdir", lambda: str(tmp_path))
    assert not load(tiny_mixtral).spilled
    monkeypatch.setattr(restack, "available_bytes", lambda device: 1000)
    spilled = load(tiny_mixtral)
    assert spilled.spilled
    weight = spilled.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert file_of(weight).startswith(f"{tmp_path}/")


def test_where_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(restack, "available_bytes", lambda device: 1000)
    assert not too_large(500)
    assert too_large(501)
    assert not too_large(501, limit=2000)
    assert spill_folder(tmp_path / "new" / "out", 501) == tmp_path
    assert spill_folder(tmp_path / "out", 500) is None
    assert spill_folder(None, 501, limit=10) is not None


def test_the_forecast_counts_it_as_disk(tiny_mixtral):
    options = {"samples": 4, "seq_len": 32, "measure": False}
    held, spilled = secateur.forecast(tiny_mixtral, **options), secateur.forecast(tiny_mixtral, memory=0, **options)
    config = json.loads((tiny_mixtral / "config.json").read_text())
    matrices = 3 * config["hidden_size"] * config["intermediate_size"] * config["num_local_experts"]
    stacked = 4 * matrices * config["num_hidden_layers"]
    assert held.memory["one"].parts["weights that the loader stacks"] == stacked
    assert "weights that the loader stacks" not in spilled.memory["one"].parts
    assert held.spill_bytes == 0
    assert spilled.spill_bytes == stacked + spilled.memory["two"].parts["hidden states"]
