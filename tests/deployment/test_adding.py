"""The examples of docs/adding-a-runtime.md: they run, from one file and one line each."""

import re

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import run
from support.paths import ROOT

import secateur
from secateur.deployment.formats import FORMATS
from secateur.deployment.runtimes import RUNTIMES

BLOCKS = dict(
    re.findall(
        r'^```python title="([^"]+)"\n(.*?)^```$',
        (ROOT / "docs" / "adding-a-runtime.md").read_text(encoding="utf-8"),
        re.M | re.S,
    )
)


def added(file: str, line: str, table: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a file of the page and put what its line says into a table."""
    names: dict = {}
    exec(compile(BLOCKS[f"src/secateur/deployment/{file}"], file, "exec"), names)
    for name, known in eval("{" + BLOCKS[line] + "}", names).items():
        monkeypatch.setitem(table, name, known)


def test_a_format_is_a_file_and_a_line(tiny_llama, tmp_path, monkeypatch):
    added("formats/pytorch_bin.py", "the line in FORMATS", FORMATS, monkeypatch)
    assert secateur.export(tiny_llama, out=tmp_path / "out", to="pytorch-bin") == "torch.load"
    wanted = load_file(tiny_llama / "model.safetensors")
    got = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert "format pytorch-bin: loaded by torch.load" in run("doctor")


def test_a_runtime_is_a_file_and_a_line(tiny_llama, monkeypatch):
    added("runtimes/no_cache.py", "the line in RUNTIMES", RUNTIMES, monkeypatch)
    results = secateur.bench([], dense=tiny_llama, runtimes=["no-cache"], prompt=[4], new=2, rounds=3, dtype="float32")
    assert [row.runtime for row in results.timings] == ["eager", "no-cache"]
    assert "runtime no-cache: yes" in run("doctor")
