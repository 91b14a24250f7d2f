"""One exported graph against transformers at many sizes; the look-up of matrices against graphs made by hand."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.formats.onnx import FILE, NOTE, compare, empty_cache, multiplied, refuse_lost_zeros, write
from secateur.deployment.runtimes.eager import eager
from secateur.deployment.runtimes.onnxruntime import onnxruntime
from secateur.errors import BadPattern, UnsupportedModel

package = pytest.importorskip("onnx", reason="the package onnx is not installed")
pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A tiny Llama of two blocks, its sites 2:4 but for one down_proj, and the folder that it was exported to."""
    config = tiny_config("llama")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight") and "1.mlp.down" not in name:
            groups = weight.data.reshape(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    folder = tmp_path_factory.mktemp("onnx")
    model.save_pretrained(folder / "source")
    (folder / "out").mkdir()
    write(open_checkpoint(folder / "source"), folder / "out")
    return model, folder / "out"


def test_one_graph_serves_prefill_and_decoding(pruned):
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model, folder = pruned
    session = runtime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    assert [held.name for held in session.get_inputs()] == [
        "ids", "past_key_0", "past_key_1", "past_value_0", "past_value_1"
    ]  # fmt: skip
    for rows, lengths in ((1, (1, 1, 1)), (2, (7, 1, 1)), (3, (1, 5, 1))):
        ids = torch.randint(128, (rows, sum(lengths)))
        past = [tensor.numpy() for side in empty_cache(model, rows) for tensor in side]
        end = 0
        for length in lengths:
            part, end = ids[:, end : end + length].numpy(), end + length
            feed = {held.name: array for held, array in zip(session.get_inputs(), [part, *past], strict=True)}
            logits, *past = session.run(None, feed)
            with torch.no_grad():
                wanted = model(ids[:, :end]).logits[:, -1]
            torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-5)
            assert past[0].shape == (rows, 2, end, 16)


def test_the_runtime_gives_the_logits_of_transformers(pruned, monkeypatch):
    if reason := onnxruntime.missing():
        pytest.skip(reason)
    _, folder = pruned

    def copied(model: PreTrainedModel, file: Path) -> None:  # an export takes ten seconds, and was tried above
        for held in folder.glob(f"{FILE}*"):
            shutil.copy(held, file.parent)

    monkeypatch.setattr("secateur.deployment.runtimes.onnxruntime.export", copied)
    source = folder.parent / "source"
    plain, other = eager.load(source, torch.float32), onnxruntime.load(source, torch.float32)
    assert (other.vocabulary, other.weight_bytes) == (plain.vocabulary, plain.weight_bytes)
    for rows, prompt in ((2, 9), (1, 5)):
        for step in range(4):
            ids = torch.randint(128, (rows, 1 if step else prompt))
            wanted, got = [model.decode(ids) if step else model.prefill(ids) for model in (plain, other)]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_file_does_not_say_where_it_was_made(pruned):
    """torch 2.13's exporter notes path, number and text of the source's lines at every node."""
    written = (pruned[1] / FILE).read_bytes()
    for trace in (b"stack_trace", b".py", str(Path(package.__file__).parent).encode(), b"secateur"):
        assert trace not in written


def test_the_note_says_what_was_checked(pruned):
    _, folder = pruned
    note = json.loads((folder / NOTE).read_text())
    assert note["matrices_with_zeros"] == note["matrices_in_2:4"] == 13
    assert note["largest_relative_difference"] < 1e-4
    assert note["logits_checked_by"].startswith("onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data", "onnx.json"]


def test_a_changed_matrix_is_named(pruned):
    model, folder = pruned
    weights = {name: weight.data for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    refuse_lost_zeros(weights, folder / FILE)
    changed = weights["model.layers.1.mlp.up_proj.weight"].clone()
    changed[5, changed[5] == 0] = 1e-3
    with pytest.raises(
        BadPattern, match=r"up_proj has zeros along its 64 inputs, but no MatMul or Gemm of model\.onnx"
    ):
        refuse_lost_zeros({"model.layers.1.mlp.up_proj": changed}, folder / FILE)
    square = weights["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(BadPattern, match="q_proj"):  # the same numbers along the other axis are another matrix
        refuse_lost_zeros({"q_proj": square.T}, folder / FILE)


def test_other_logits_are_refused(pruned):
    model, folder = pruned
    norm = model.get_parameter("model.norm.weight").data
    norm[0] += 1
    try:
        with pytest.raises(UnsupportedModel, match=r"computes logits from model\.onnx that differ by"):
            compare(model, folder / FILE)
    finally:
        norm[0] -= 1


def test_the_reference_evaluator_stands_in(pruned, monkeypatch):
    model, folder = pruned
    monkeypatch.setattr("secateur.deployment.formats.onnx.find_spec", lambda name: None)
    found = compare(model, folder / FILE)
    assert found["logits_checked_by"] == f"onnx {package.__version__}"
    assert found["largest_relative_difference"] < 1e-4
    monkeypatch.setattr("secateur.deployment.formats.onnx.MOST_BY_REFERENCE", 10)
    assert compare(model, folder / FILE) == {"logits_checked_by": None}


def graph(file: Path, nodes: list[Any], **constants: Tensor) -> Path:
    """An ONNX file with these nodes and constants, x as input and y as output."""
    helper, float32 = package.helper, package.TensorProto.FLOAT
    held = helper.make_graph(
        nodes,
        "made by hand",
        [helper.make_tensor_value_info("x", float32, [None, None])],
        [helper.make_tensor_value_info("y", float32, [None, None])],
        [package.numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    package.save(helper.make_model(held), str(file))
    return file


def test_matrices_are_found_as_out_by_in(tmp_path):
    node, w = package.helper.make_node, torch.randn(3, 5)
    cases = [
        ([node("MatMul", ["x", "w"], ["y"])], w.T),
        ([node("Gemm", ["x", "w"], ["y"])], w.T),
        ([node("Gemm", ["x", "w"], ["y"], transB=1)], w),
        ([node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], w),
        ([node("Transpose", ["w"], ["t"]), node("Gemm", ["x", "t"], ["y"], transB=1)], w.T),
    ]
    for nodes, constant in cases:
        found = list(multiplied(graph(tmp_path / "g.onnx", nodes, w=constant.contiguous())))
        assert len(found) == 1
        np.testing.assert_array_equal(found[0], w.numpy())
    assert list(multiplied(graph(tmp_path / "g.onnx", [node("MatMul", ["w", "x"], ["y"])], w=w))) == []


def test_what_cannot_be_exported_is_refused(tmp_path, tiny_llama, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path / "experts")
    with pytest.raises(UnsupportedModel, match="has fused experts"):
        write(open_checkpoint(tmp_path / "experts"), tmp_path)
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM keeps other things than keys and values"):
        empty_cache(tiny_model("mamba"), 1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        "secateur.deployment.formats.onnx.find_spec", lambda name: None if name == "onnxscript" else name
    )
    with pytest.raises(UnsupportedModel, match=r"ONNX needs the package onnxscript\. .*pip install 'secateur\[onnx\]'"):
        write(open_checkpoint(tiny_llama), tmp_path)
