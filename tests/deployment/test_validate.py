"""Does a runtime use the zeros? Asked of checkpoints whose zeros are put there by hand, so that the answer is known."""

import json
import re
import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import cli, runner
from support.families import tiny_model
from support.quantised import tiny_llama, write
from support.spoilt_gguf import requantised
from support.texts import byte_tokenizer
from torch import Tensor

import secateur
from secateur.deployment.packed_model import pack_model
from secateur.deployment.sparsity_support import RULES, parse_build_log
from secateur.deployment.validate import MatrixVerdict, Validation, rows, summary, validate
from secateur.errors import UnknownName

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SITE = "model.layers.1.mlp.down_proj.weight"
PREFILL = 512


def along_inputs(weight: Tensor) -> Tensor:
    """2:4 as products need it."""
    weight[:, 0::4], weight[:, 1::4] = 0, 0
    return weight


def along_outputs(weight: Tensor) -> Tensor:
    """2:4 along the other axis."""
    weight[0::4], weight[1::4] = 0, 0
    return weight


def unstructured(weight: Tensor) -> Tensor:
    """Half of every row, the first half, so that half of the groups are full."""
    weight[:, : weight.shape[1] // 2] = 0
    return weight


@pytest.fixture
def made(tmp_path):
    """A function that saves a tiny model with zeros of that kind in its sites, and a record of them or none."""

    def made(zeros, *, kind="llama", dtype=torch.bfloat16, only=MATRICES, record: dict | None = None) -> Path:
        model: Any = tiny_model(kind)
        model.to(dtype)
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith(".weight") and name.split(".")[-2] in only:
                tensors[name] = zeros(tensor)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if record is not None:
            (folder / "pruning.json").write_text(json.dumps(record))
        return folder

    return made


def change(folder: Path, name: str, changed) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = changed(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def site(found: Validation, name: str = SITE) -> MatrixVerdict:
    return next(site for site in found.sites if site.name == name)


PACKED = {("packed", 1), ("packed-int8", 1), ("packed-int4", 1)}
YES_FOR_2_4 = PACKED | {("semi-structured", PREFILL), ("tensorrt-llm", 1), ("tensorrt-llm", PREFILL)}
YES_FOR_2_4 |= {("tensorrt", 1), ("tensorrt", PREFILL)}


@pytest.mark.parametrize("zeros", [along_inputs, along_outputs, unstructured])
def test_every_runtime_on_every_kind_of_zeros(made, zeros):
    folder = made(zeros)
    wanted = YES_FOR_2_4 if zeros is along_inputs else PACKED
    for runtime in RULES:
        for batch in (1, PREFILL):
            found = validate(folder, runtime=runtime, batch=batch)
            assert {site.used for site in found.sites} == {(runtime, batch) in wanted}, (runtime, batch)
            assert found.kept == ((runtime, batch) in wanted)
            assert len(found.sites) == 4 * 7
            assert all(site.reason and site.promised == "50.0%" for site in found.sites)


@pytest.mark.parametrize("runtime", ["semi-structured", "tensorrt", "tensorrt-llm"])
def test_the_wrong_axis_is_named(made, runtime):
    found = validate(made(along_outputs), runtime=runtime, batch=PREFILL)
    assert site(found).reason == "2:4 in 100 % of the groups along outputs: the wrong axis, products add over inputs"


def test_groups_that_are_too_full_are_counted(made):
    found = validate(made(unstructured), runtime="semi-structured", batch=PREFILL)
    assert site(found).reason == "50.00% of the groups of 4 inputs keep more than 2 weights, so it is not 2:4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("runtime", ["packed", "semi-structured", "tensorrt", "tensorrt-llm"])
def test_dtypes(made, runtime, dtype):
    found = validate(made(along_inputs, dtype=dtype), runtime=runtime, batch=1 if runtime == "packed" else PREFILL)
    refused = torch.float16 if runtime == "packed" else torch.float32
    assert found.kept == (dtype != refused)
    if dtype == refused:
        assert str(dtype).removeprefix("torch.") in site(found).reason


def test_few_rows_of_x_gain_nothing_on_sparse_tensor_cores(made):
    folder = made(along_inputs)
    for batch, used in ((1, False), (64, False), (65, True)):
        assert validate(folder, runtime="semi-structured", batch=batch).kept == used
    found = validate(folder, runtime="semi-structured")
    assert "no faster than the dense one" in site(found).reason
    assert any("0.196 ms" in note and "pytorch#111339" in note for note in found.notes)
    assert any("arXiv:2603.05232" in note for note in found.notes)


def test_shapes_that_no_backend_takes(made):
    """[60, 128]: 60 is no multiple of 16; TensorRT wants 8. Of a Llama the shape would be refused."""
    folder = made(along_inputs)
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    change(folder, SITE, lambda weight: weight[:60].contiguous())
    found = validate(folder, runtime="semi-structured", batch=PREFILL)
    assert site(found).reason == "[60, 128] is no multiple of (16, 16) for cuSPARSELt, (32, 64) for CUTLASS"
    assert not found.kept
    assert site(validate(folder, runtime="tensorrt")).reason == "[60, 128] is no multiple of (8, 16)"
    change(folder, SITE, lambda weight: weight[:, :126].contiguous())
    assert site(validate(folder, runtime="tensorrt")).reason == "126 inputs are no groups of 4"


@pytest.mark.parametrize("share", [0.3, 0.39, 0.41, 0.6])
def test_what_is_said_of_packed_is_what_pack_model_does(made, share):
    def zeros(weight: Tensor) -> Tensor:
        weight.flatten()[: round(share * weight.numel())] = 0
        return weight

    folder = made(zeros)
    model: Any = tiny_model("llama").to(torch.bfloat16)  # type: ignore[call-arg]
    model.load_state_dict(load_file(folder / "model.safetensors"))
    packed = {f"{name}.weight" for name in pack_model(model, measure=False)}
    found = validate(folder, runtime="packed")
    assert {site.name for site in found.sites if site.used} == packed
    assert found.kept == bool(packed)
    assert not validate(folder, runtime="packed", batch=9).kept


@pytest.mark.parametrize(("runtime", "used"), [("packed", False), ("semi-structured", False), ("tensorrt", True)])
def test_conv1d_is_judged_along_its_inputs(made, runtime, used):
    """GPT-2 stores [in, out], so the zeros that run along inputs run down its columns."""
    only = ("c_attn", "c_proj", "c_fc")
    found = validate(made(along_outputs, kind="gpt2", only=only), runtime=runtime, batch=PREFILL)
    assert len(found.sites) == 4 * 4
    assert {site.used for site in found.sites} == {used}
    assert used or {site.reason.split(";")[0] for site in found.sites} == {"a Conv1D"}
    wrong = validate(made(along_inputs, kind="gpt2", only=only), runtime="tensorrt")
    assert all("wrong axis" in site.reason for site in wrong.sites)


def test_experts_are_no_linear_layers(made):
    folder = made(lambda weight: weight, kind="mixtral")
    tensors = load_file(folder / "model.safetensors")
    experts = [name for name, tensor in tensors.items() if "experts" in name and tensor.dim() > 1]
    for name in experts:
        change(folder, name, lambda weight: weight.where(torch.arange(weight.shape[-1]) % 4 > 1, 0.0))
    for runtime in ("packed", "semi-structured"):
        found = {site.name: site for site in validate(folder, runtime=runtime, batch=1).sites}
        assert {found[name].reason.split(";")[0] for name in experts} == {"a stack of experts"}
    assert validate(folder, runtime="tensorrt").kept


def test_negative_zeros_are_named(made):
    folder = made(along_inputs)
    change(folder, SITE, lambda weight: torch.where(weight == 0, -0.0, weight))
    for runtime in ("tensorrt", "tensorrt-llm"):
        found = validate(folder, runtime=runtime)
        assert "-0.0" in site(found).reason
        assert not found.kept
        assert sum(site.used for site in found.sites) == 27
    found = validate(folder, runtime="semi-structured", batch=PREFILL)  # torch compares numbers, not bits
    assert found.kept
    assert any(SITE in note and "4096 zeros that are -0.0" in note for note in found.notes)


def test_nan_is_named_before_all_else(made):
    def spoilt(weight: Tensor) -> Tensor:
        weight[3, 5] = torch.nan
        return weight

    folder = made(along_inputs, record={"kind": "structured", "parameters": [10, 5], "pattern": "channels:50%"})
    change(folder, SITE, spoilt)
    for runtime in RULES:
        found = validate(folder, runtime=runtime, batch=PREFILL)
        assert site(found).reason == "1 of its weights are NaN or Inf, so the model has no output"
        assert not found.kept


def test_a_smaller_model_is_smaller_everywhere(made):
    record = {"method": "energy", "pattern": "channels:25%", "kind": "structured", "parameters": [1000, 800]}
    folder = made(lambda weight: weight, record=record)
    for runtime in RULES:
        found = validate(folder, runtime=runtime)
        assert found.kept
        assert {site.used for site in found.sites} == {True}
        assert found.notes[0].startswith("1,000 parameters became 800")
        assert found.certain
        assert len(found.notes) == 1
        assert found.promised == "energy channels:25%, as its pruning.json says"


def record_of(folder: Path, pattern: str, names: list[str]) -> None:
    sites = [{"site": name.removesuffix(".weight"), "pattern": pattern, "sparsity": 0.5} for name in names]
    held = {"method": "wanda", "pattern": pattern, "kind": "semi-structured", "parameters": None, "sites": sites}
    (folder / "pruning.json").write_text(json.dumps(held))


def test_a_promise_without_zeros_is_not_kept(made):
    folder = made(lambda weight: weight)
    record_of(folder, "2:4", [SITE])
    found = validate(folder, runtime="tensorrt")
    assert site(found).reason == "2:4 was promised; 0.00% zeros were found"
    assert site(found).promised == "2:4"
    assert not found.kept
    assert found.promised == "wanda 2:4, as its pruning.json says"


def test_what_was_left_dense_is_no_broken_promise(made):
    folder = made(along_inputs, only=("down_proj",))
    record_of(folder, "2:4", [SITE.replace(".1.", f".{i}.") for i in range(4)])
    found = validate(folder, runtime="tensorrt-llm")
    assert found.kept
    assert site(found, "model.layers.0.mlp.up_proj.weight").reason == "dense: nothing was pruned here"
    assert [site.promised for site in found.sites].count("2:4") == 4


def test_a_dense_model_promises_nothing(tiny_llama):
    found = validate(tiny_llama, runtime="packed")
    assert not found.kept
    assert found.promised == "nothing: no weight matrix has zeros, and there is no pruning.json"


def test_tensorrt_llm_fuses_and_splits_before_it_looks(made):
    folder = made(along_inputs)
    change(folder, "model.layers.2.self_attn.v_proj.weight", torch.ones_like)
    found = validate(folder, runtime="tensorrt-llm", ranks=2)
    lost = {site.name.split(".")[-2]: site.reason for site in found.sites if site.promised and not site.used}
    assert lost.keys() == {"q_proj", "k_proj"}
    assert lost["q_proj"] == (
        "transformer.layers.2.attention.qkv on rank 0: model.layers.2.self_attn.v_proj is not 2:4 along its inputs"
    )
    assert "3 ranks cannot share evenly" in site(validate(folder, runtime="tensorrt-llm", ranks=3)).reason
    command = next(note for note in found.notes if note.startswith("Build:"))
    assert f"--checkpoint_dir {folder} " in command
    assert "--gemm_plugin disable --weight_sparsity" in command
    assert any(note.startswith("Dense in silence with --fast_build") for note in found.notes)


def test_what_the_builder_chooses_by_timing_is_not_certain(made):
    found = validate(made(along_inputs), runtime="tensorrt")
    assert found.kept
    assert not found.certain
    assert "tensorrt may use it in 28 of 28 tensors" in summary(found)[1]
    assert site(found).reason.endswith("NVIDIA saw them win from 256 inputs and outputs on")


def test_tensorrt_llm_without_a_writer_for_the_model(made):
    found = validate(made(along_outputs, kind="gpt2", only=("c_attn", "c_proj", "c_fc")), runtime="tensorrt-llm")
    assert {site.used for site in found.sites} == {False}
    assert "is a GPT2LMHeadModel" in found.sites[0].reason


def test_an_unknown_architecture_is_read_all_the_same(made):
    folder = made(along_inputs)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "architectures": ["X"]}))
    found = validate(folder, runtime="semi-structured", batch=PREFILL)
    assert found.kept
    assert any("does not know this architecture" in note for note in found.notes)


def test_an_unknown_runtime(tiny_llama):
    with pytest.raises(UnknownName, match=r"There is no runtime 'tensorrt-lm'\. Did you mean 'tensorrt-llm'"):
        validate(tiny_llama, runtime="tensorrt-lm")


def test_the_answer_is_data_and_text(made):
    found = validate(made(along_inputs), runtime="vllm")
    assert json.loads(json.dumps(asdict(found)))["kept"] is False
    lines = list(rows(found))
    assert (len(lines), {len(line) for line in lines}, {line[5] for line in lines}) == (28, {7}, {"no"})
    said = summary(found)
    assert said[1] == "vllm will use it in 0 of 28 tensors with 1 rows of x: not kept."
    assert said[-1].startswith("Known from: vllm#32688, #36799 (2026-11-22)")


def test_every_rule_says_where_it_is_known_from():
    assert all(rule.source and date.fromisoformat(rule.date) for rule in RULES.values())


OLD_LOG = """
[11/26/2026-00:14:05] [TRT] [I] Detected 3 inputs
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: qkv/MatMul_0, Conv_619 + Relu_620, fc
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: fc
"""
NEW_LOG = """
rank 0 | [V] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
rank 0 | [V] (Sparsity) Chose 0 layer(s) using sparse tactics
[TRT] [I] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a/b, c
[TRT] [I] (Sparsity) Chose 1 layer(s) using sparse tactics: c
"""


def test_build_logs_of_both_kinds():
    (old,) = parse_build_log(OLD_LOG)
    assert (old.eligible, old.picked) == (3, 1)
    assert old.eligible_layers == ("qkv/MatMul_0", "Conv_619 + Relu_620", "fc")
    assert old.picked_layers == ("fc",)
    first, last = parse_build_log(NEW_LOG)
    assert (first.eligible, first.picked, first.eligible_layers) == (39, 0, ())
    assert (last.eligible_layers, last.picked_layers) == (("a/b", "c"), ("c",))


def test_a_build_log_in_which_nothing_is_picked_or_said():
    line = "[I] (Sparsity) Layers eligible for sparse math:\n[I] (Sparsity) TRT inference plan picked sparse "
    (empty,) = parse_build_log(line + "implementation for layers: \n")
    assert (empty.eligible, empty.picked, empty.eligible_layers) == (0, 0, ())
    assert parse_build_log("[TRT] [I] Engine generation completed in 12 seconds.\n") == ()


# What was quantised after pruning


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A tiny Llama in 2:4, and its record."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = tiny_llama().float()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            groups = weight.data.view(-1, 4)
            weight.data = torch.where(groups.abs().argsort(-1).argsort(-1) >= 2, groups, 0).view_as(weight)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def in_gguf(pruned: Path, kind: int, folder: Path) -> Path:
    """The model as a GGUF file with its matrices in a type, quantised by the package gguf."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    secateur.export(pruned, to="gguf", out=folder)
    file = next(folder.glob("*.gguf"))
    requantised(file, kind)
    return file


def in_integers(pruned: Path, folder: Path) -> Path:
    """The model in compressed-tensors' integers of four bits, packed here: symmetric, groups of 32."""
    shutil.copytree(pruned, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight, module = tensors.pop(name).float(), name.removesuffix(".weight")
        groups = weight.unflatten(-1, (-1, 32))
        scales = groups.abs().amax(-1) / 7
        codes = (groups / scales.unsqueeze(-1)).round().flatten(-2).long() + 8
        words = (codes.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
        tensors[f"{module}.weight_packed"] = words.to(torch.uint32).view(torch.int32)
        tensors[f"{module}.weight_scale"] = scales.bfloat16()
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    write(folder, tensors, {"quantization_config": settings})
    return folder


Q5_1 = 7
"""A type of GGUF: numbers of five bits, and a float in place of their zero."""


def test_zeros_that_a_quantiser_moved_are_no_promise_kept(pruned, tmp_path):
    file = in_gguf(pruned, Q5_1, tmp_path / "out")
    alone = validate(file, runtime="semi-structured", batch=PREFILL)
    assert not alone.kept
    assert alone.promised == "nothing: no weight matrix has zeros, and there is no pruning.json"
    assert any("It is stored as GGUF (Q5_1" in note and "--against that model" in note for note in alone.notes)
    for runtime in ("semi-structured", "tensorrt", "packed"):
        found = validate(file, runtime=runtime, batch=PREFILL, against=pruned)
        assert not found.kept
        assert found.promised == f"zeros in 14 tensors of {pruned}"
        assert (site(found).promised, site(found).used) == ("50.0%", False)
        assert re.match(r"\d+\.\d\d% of the zeros that it had came back in Q5_1: ", site(found).reason)


def test_zeros_that_a_quantiser_kept_want_a_dtype_that_the_runtime_has(pruned, tmp_path):
    folder = in_integers(pruned, tmp_path / "integers")
    found = validate(folder, runtime="semi-structured", batch=PREFILL, against=pruned)
    assert not found.kept
    assert site(found).reason == "4-bit integers: float16 or bfloat16 was wanted"
    assert validate(folder, runtime="semi-structured", batch=PREFILL).promised.startswith("zeros in 14 tensors; there")


def test_the_promise_is_that_of_the_pruned_one(pruned, tmp_path):
    record = {"method": "wanda", "pattern": "2:4", "sites": [{"site": SITE.removesuffix(".weight"), "pattern": "2:4"}]}
    shutil.copytree(pruned, tmp_path / "recorded")
    (tmp_path / "recorded" / "pruning.json").write_text(json.dumps(record))
    folder = in_integers(pruned, tmp_path / "integers")
    found = validate(folder, runtime="tensorrt", against=tmp_path / "recorded")
    assert found.promised == f"wanda 2:4, as the pruning.json of {tmp_path / 'recorded'} says"
    assert (site(found).promised, site(found).reason) == (
        "2:4", "4-bit integers: float16, bfloat16, int8 or float8 was wanted"
    )  # fmt: skip


def test_the_command_line_holds_it_against_the_pruned_one(pruned, tmp_path):
    file = in_gguf(pruned, Q5_1, tmp_path / "out")
    given = ("validate", file, "--for", "semi-structured", "--against", pruned, "--batch", PREFILL)
    result = runner.invoke(cli.app, [str(one) for one in given])
    assert result.exit_code == 1
    assert "of the zeros that it had came back in Q5_1" in " ".join(result.stdout.split())
