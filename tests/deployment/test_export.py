"""Packed checkpoints come back byte for byte, load without a dense copy, and what was altered is refused."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.families import tiny_model
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoints.folder import DTYPES, _read_header, open_checkpoint
from secateur.checkpoints.shards import save_in_shards
from secateur.deployment.formats import FORMATS, format_of
from secateur.deployment.formats.packed import load_packed, shards, write
from secateur.deployment.packed_model import PackedLinear
from secateur.errors import (
    BadCheckpoint,
    BadPattern,
    NonFinite,
    OutputRefused,
    SecateurError,
    UnknownName,
    UnsupportedModel,
)
from secateur.kernels.packed import Packed
from secateur.methods.values import Values, find_codes

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("export") / "half"
    secateur.prune(tiny_llama, out=folder, method="magnitude", pattern="60%", calibration=str(text_file), samples=1)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "pruning.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_packed_and_back_is_the_same_folder(tmp_path, family, dtype):
    model = tiny_model(family).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    try:
        secateur.export(tmp_path / "dense", out=tmp_path / "packed", to="packed")
    except UnsupportedModel as error:  # its matrices are all three-dimensional or too odd
        pytest.skip(str(error))
    assert format_of(tmp_path / "packed") == "packed"
    secateur.export(tmp_path / "packed", out=tmp_path / "back", to="dense")
    assert files(tmp_path / "back") == files(tmp_path / "dense")


def size(folder: Path, glob: str) -> int:
    return sum(f.stat().st_size for f in folder.glob(glob))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_folder_loads_straight_into_packed_layers(half, tmp_path, dtype):
    secateur.export(half, out=tmp_path / "packed", to="packed")
    assert size(tmp_path / "packed", "*.safetensors") < 0.75 * size(half, "*.safetensors")
    loaded = load_packed(tmp_path / "packed", dtype=dtype, measure=False)
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 4 * 7
    plain = AutoModelForCausalLM.from_pretrained(half, dtype=dtype)
    wanted, got = plain(IDS).logits, loaded(IDS).logits
    assert (got - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_int8_values_come_back_as_what_they_stand_for(half, tmp_path):
    secateur.export(half, out=tmp_path / "packed", to="packed", values="int8")
    loaded = load_packed(tmp_path / "packed", dtype=torch.float32, measure=False)
    secateur.export(tmp_path / "packed", out=tmp_path / "back", to="dense")
    back, plain = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "back", half))
    assert (tmp_path / "back/model.safetensors").stat().st_mode == (tmp_path / "back/config.json").stat().st_mode
    wanted, got, exact = back(IDS).logits, loaded(IDS).logits, plain(IDS).logits
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    assert 1e-4 < (wanted - exact).norm() / exact.norm() < 0.05
    for name, tensor in back.named_parameters():
        if name.endswith("proj.weight"):
            kept = plain.get_parameter(name)
            assert ((tensor - kept).abs() <= 0.51 * kept.abs().amax(1, keepdim=True) / 127).all()


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> dict[str, Path]:
    """Pruned folders whose kept weights lie on grids, by the name of the grid."""
    folders = {}
    for values in ("int8", "int4 of group 64", "int4 of row", "int3 of group 64"):
        folders[values] = tmp_path_factory.mktemp("export") / values.replace(" ", "-")
        secateur.prune(
            tiny_llama, out=folders[values], method="wanda", pattern="60%", values=values, calibration=str(text_file),
            samples=1,
        )  # fmt: skip
    return folders


@torch.no_grad()
@pytest.mark.parametrize("values", ["int8", "int4 of group 64", "int4 of row", "int3 of group 64"])
def test_what_lies_on_the_grid_is_packed_to_the_bit(on_grid, tmp_path, values):
    folder = on_grid[values]
    secateur.export(folder, out=tmp_path / "packed", to="packed", values=values)
    (shard,) = shards(tmp_path / "packed")
    assert shard.exact
    assert shard.description["values"] == values
    tensors, dense = load_file(shard.file), load_file(folder / "model.safetensors")
    for name in shard.description["columns"]:
        assert tensors[f"{name}.values"].dtype == (torch.int8 if values == "int8" else torch.uint8)
        codes = find_codes(dense[name], Values(values.split()[0], None if "group" not in values else 64))
        assert codes is not None
        stored = tensors[f"{name}.scales"].float().view(codes.scales.shape)
        assert torch.equal(stored, codes.scales)
        packed = shard.tensor(name)
        assert isinstance(packed, Packed)
        assert torch.equal(packed.dense(), codes.dense())
    for name, tensor in tensors.items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name
    secateur.export(tmp_path / "packed", out=tmp_path / "back", to="dense")
    assert files(tmp_path / "back") == files(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted, got = plain(IDS).logits, load_packed(tmp_path / "packed", dtype=torch.float32, measure=False)(IDS).logits
    assert (got - wanted).norm() / wanted.norm() < 1e-4


@torch.no_grad()
def test_other_weights_are_rounded_to_int4_and_come_back_as_what_they_stand_for(half, tmp_path):
    secateur.export(half, out=tmp_path / "packed", to="packed", values="int4 of group 64")
    assert not shards(tmp_path / "packed")[0].exact
    assert size(tmp_path / "packed", "*.safetensors") < 0.5 * size(half, "*.safetensors")
    secateur.export(tmp_path / "packed", out=tmp_path / "back", to="dense")
    back, dense = load_file(tmp_path / "back/model.safetensors"), load_file(half / "model.safetensors")
    assert back.keys() == dense.keys()
    for name, weight in dense.items():
        if not name.endswith("proj.weight"):
            assert torch.equal(back[name], weight)
            continue
        most = weight.unflatten(1, (-1, 64)).abs().amax(2).repeat_interleave(64, 1)
        assert ((back[name] - weight).abs() <= 0.505 * most / 7).all()
        assert (back[name][weight == 0] == 0).all()
        assert back[name].dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    wanted, got = plain(IDS).logits, load_packed(tmp_path / "packed", dtype=torch.float32, measure=False)(IDS).logits
    assert (got - wanted).norm() / wanted.norm() < 1e-4


def test_transposed_matrices_are_not_rounded(tmp_path):
    model = tiny_model("gpt2")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    model.save_pretrained(tmp_path / "dense")
    secateur.export(tmp_path / "dense", out=tmp_path / "packed", to="packed", values="int4 of row")
    secateur.export(tmp_path / "packed", out=tmp_path / "back", to="dense")
    assert files(tmp_path / "back") == files(tmp_path / "dense")


def test_tensors_of_odd_sizes_lie_where_their_numbers_want_them(half, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(half, folder)
    tensors = load_file(folder / "model.safetensors")
    odd = {
        f"model.layers.0.odd.{number}": torch.ones(size, dtype=dtype)
        for number, (size, dtype) in enumerate([(3, torch.uint8), (5, torch.bfloat16), (1, torch.float32)])
    }
    save_file(tensors | odd, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(folder)
    target = tmp_path / "packed"
    target.mkdir()
    write(source, target, values="int4 of row")
    for name, place in _read_header(target / "packed-model.safetensors"):
        assert place.offset % DTYPES[place.dtype].itemsize == 0, name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.sampled_from(["bitmap", "values", "columns", "missing", "header", "dtype"]), place=st.integers(0, 10**6),
    by=st.integers(1, 2**31), values=st.sampled_from(["as stored", "int4 of group 64"]),
)  # fmt: skip
def test_what_was_altered_is_refused(on_grid, half, tmp_path_factory, part, place, by, values):
    folder = tmp_path_factory.mktemp("altered")
    secateur.export(on_grid.get(values, half), out=folder / "packed", to="packed", values=values)
    file = shards(folder / "packed")[0].file
    told, tensors = shards(folder / "packed")[0].description, load_file(file)
    name = sorted(told["columns"])[place % len(told["columns"])]
    if part == "columns":
        told["columns"][name] += by
    elif part == "missing":
        del tensors[f"{name}.values"]
    elif part == "header":
        told["header"] = told["header"][: place % len(told["header"])]
    elif part == "dtype":
        tensors[f"{name}.values"] = tensors[f"{name}.values"].double()
    elif part == "values":
        tensors[f"{name}.values"] = tensors[f"{name}.values"][
            : -9 - place % 40
        ].clone()  # more than is there beside the slack
    else:
        tensors[f"{name}.bitmap"].view(-1)[place % tensors[f"{name}.bitmap"].numel()] ^= by
    save_file(tensors, file, metadata={"secateur.packed": json.dumps(told)})
    with pytest.raises(BadCheckpoint):
        secateur.export(folder / "packed", out=folder / "back", to="dense")
    assert not (folder / "back").exists()


@pytest.mark.parametrize("name", ["packed", "sparse-bitmask"])
@pytest.mark.parametrize(("odd", "error", "said"), [(-0.0, BadCheckpoint, "-0.0"), (float("nan"), NonFinite, "NaN")])
def test_odd_values_are_refused_by_name(half, tmp_path, name, odd, error, said):
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in half.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.2.mlp.up_proj.weight"]
    weight.view(-1)[int((weight == 0).flatten().nonzero()[0])] = odd
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=rf"model.layers.2.mlp.up_proj.* holds {said}"):
        secateur.export(folder, out=tmp_path / "out", to=name)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_says_why(half, tiny_llama, tmp_path):
    for to, source, error, said in (
        ("dense", half, BadCheckpoint, "is a dense checkpoint already"),
        ("paked", half, UnknownName, "Did you mean 'packed'"),
        ("packed", tiny_llama, UnsupportedModel, "there is nothing to pack"),
        ("sparse-24-bitmask", half, SecateurError, "is not 2:4"),
    ):
        with pytest.raises(error, match=said):
            secateur.export(source, out=tmp_path / "out", to=to)
    with pytest.raises(UnknownName, match="option of sparse-bitmask"):
        secateur.export(half, out=tmp_path / "out", to="sparse-bitmask", values="int8")
    for values, said in (
        ("int5", "'int5' is no kind of values"),
        ("int4 of group 32", "no values of int4 of group 32. Say 'as stored', 'int8', 'int4', 'int4 of group 64'"),
        ("int4", "_proj.weight has 64. Say 'int4 of group 64'"),
        ("nvfp4", "no values of nvfp4"),
    ):
        with pytest.raises(BadPattern, match=re.escape(said)):
            secateur.export(half, out=tmp_path / "out", to="packed", values=values)
    secateur.export(half, out=tmp_path / "out", to="packed")
    with pytest.raises(OutputRefused, match="exists already"):
        secateur.export(half, out=tmp_path / "out", to="packed")
    with pytest.raises(BadCheckpoint, match=r"secateur export .* --to dense"):
        secateur.evaluate(tmp_path / "out")
    with pytest.raises(BadCheckpoint, match="Export it to 'dense' first"):
        secateur.export(tmp_path / "out", out=tmp_path / "two", to="sparse-bitmask")


@torch.no_grad()
def test_orphaned_formats_become_dense_checkpoints_again(half, tmp_path, monkeypatch):
    module = sys.modules["secateur.deployment.export"]
    monkeypatch.setattr(module, "save_in_shards", partial(save_in_shards, most=100_000))
    secateur.export(half, out=tmp_path / "old", to="sparse-bitmask")
    secateur.export(tmp_path / "old", out=tmp_path / "back", to="dense")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    old, new = (AutoModelForCausalLM.from_pretrained(f)(IDS).logits for f in (half, tmp_path / "back"))
    assert torch.equal(old, new)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((half / "config.json").read_text())


def test_a_bitmask_is_a_source_like_any_other(half, text_file, tmp_path, monkeypatch):
    """What is published in it has no record of ours; what is made of it is what is made of the dense folder."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    secateur.export(half, out=tmp_path / "packed", to="sparse-bitmask")
    (tmp_path / "packed" / "pruning.json").unlink(missing_ok=True)
    judged: Any = {"evaluation": str(text_file), "windows": 2, "seq_len": 16}
    evaluations = [secateur.evaluate(folder, **judged).perplexity for folder in (half, tmp_path / "packed")]
    inspections = [secateur.inspect(folder) for folder in (half, tmp_path / "packed")]
    assert inspections[1].format == "sparse-bitmask"
    assert inspections[0].sparsity == inspections[1].sparsity
    options: Any = {"method": "magnitude", "pattern": "70%", "calibration": str(text_file), "samples": 2, "seq_len": 16}
    options["result_dtype"] = "float32"
    for name, folder in (("one", half), ("other", tmp_path / "packed")):
        secateur.prune(folder, out=tmp_path / name, **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert abs(evaluations[0] - evaluations[1]) < 0.02 * evaluations[0]  # of which one is read in bfloat16


def test_every_format_says_what_loads_it_and_the_command_too(half, tmp_path):
    assert all(known.loaded_by for known in FORMATS.values())
    said = run("export", half, "--to", "packed", "--values", "int8", "--out", tmp_path / "packed", "--quiet")
    assert "Loaded by: secateur" in said
    record = json.loads((tmp_path / "packed" / "pruning.json").read_text())
    assert record["pattern"] == "60%"
    assert record["exported"]["to"] == "packed"
