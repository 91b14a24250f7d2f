"""ONNX graphs: what is read of them is what ONNX Runtime multiplies by, and is found in the pruned checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.command_line import run
from torch import Tensor

import secateur
from secateur.checkpoints.quantised.onnx import onnx_file, onnx_source
from secateur.checkpoints.quantised.unpack import decoded_pieces
from secateur.deployment.inspect import Against
from secateur.errors import BadCheckpoint, UnsupportedModel

onnx: Any = pytest.importorskip("onnx", reason="the package onnx is not installed")
runtime: Any = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
SHAPES = {"q_proj": (64, 48), "up_proj": (96, 64), "down_proj": (64, 96), "other": (64, 96)}
"""Of matrices [out, in]; 48 inputs are no whole groups of 32."""
FLOAT = onnx.TensorProto.FLOAT
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # in its HQQ


def matrices() -> dict[str, Tensor]:
    """Matrices in 2:4, by their names in a checkpoint."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=draw).view(-1, 4)
        kept = weight.abs().argsort(-1).argsort(-1) >= 2
        made[f"model.layers.0.{name}.weight"] = torch.where(kept, weight, 0).view(shape)
    return made


def graph_of(nodes: list[Any], constants: dict[str, Any]) -> Any:
    """A model of these nodes, whose constants have these numbers."""
    given = [onnx.helper.make_tensor_value_info("x", FLOAT, None)]
    wanted = [onnx.helper.make_tensor_value_info("y", FLOAT, None)]
    protos = []
    for name, one in constants.items():
        array = isinstance(one, np.ndarray)
        protos.append(onnx.numpy_helper.from_array(np.ascontiguousarray(one), name) if array else one)
    graph = onnx.helper.make_graph(nodes, "graph", given, wanted, protos)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)


def exported(weights: dict[str, Tensor]) -> Any:
    """A graph that multiplies by each, in constants that an exporter turned and numbered."""
    constants = {f"val_{i}": weight.T.numpy() for i, weight in enumerate(weights.values())}
    nodes = [onnx.helper.make_node("MatMul", ["x", name], [f"y{name}"], f"node_{name}") for name in constants]
    nodes.append(onnx.helper.make_node("Sum", [f"y{name}" for name in constants], ["y"]))
    return graph_of(nodes, constants)


def saved(model: Any, file: Path, *, beside: bool = False) -> Path:
    """A model in a file, its constants beside it or within."""
    file.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = dict(save_as_external_data=True, location="numbers.data", size_threshold=0)
    onnx.save(model, str(file), **(given if beside else {}))
    return file


def quantised(way: str, model: Any) -> Any:
    """A graph whose products are quantised by ONNX Runtime."""
    made: Any = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    form = made.QuantFormat.QDQ if way.startswith("qdq") else made.QuantFormat.QOperator
    bits, symmetric = int(way[-2]), way[-1] == "s"
    settings = dict(block_size=32, is_symmetric=symmetric, bits=bits, quant_format=form)
    config = made.DefaultWeightOnlyQuantConfig(**settings)
    if way.startswith("hqq"):
        config = made.HQQWeightOnlyQuantConfig(block_size=32, bits=bits)
    quantiser = made.MatMulNBitsQuantizer(model, algo_config=config)
    quantiser.process()
    return quantiser.model.model


def multiplied(model: Any) -> list[np.ndarray]:
    """What ONNX Runtime multiplies by in each MatMulNBits and DequantizeLinear, [out, in]."""
    constants = {one.name: one for one in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "DequantizeLinear"):
            continue
        one = onnx.NodeProto()
        one.CopyFrom(node)
        one.output[0] = "y"
        given = {}
        if node.op_type == "MatMulNBits":
            one.input[0] = "x"
            given["x"] = np.eye(next(a.i for a in node.attribute if a.name == "K"), dtype=np.float32)
        alone = graph_of([one], {name: constants[name] for name in one.input if name in constants})
        if not given:
            del alone.graph.input[:]
        session = runtime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, given)[0].T)
    return found


WAYS = ("nbits-4s", "nbits-4a", "nbits-8s", "nbits-8a", "nbits-2a", "hqq-4a", "qdq-4s", "qdq-4a")


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_bit_is_what_the_runtime_multiplies_by(way: str, beside: bool, tmp_path: Path):
    weights = {name: w for name, w in matrices().items() if way[:3] != "hqq" or not w.shape[1] % 32}
    model = quantised(way, exported(weights))
    expected = multiplied(model)
    tensors = onnx_source(saved(model, tmp_path / "model.onnx", beside=beside)).tensors
    assert [tensor.shape for tensor in tensors] == [tuple(weight.shape) for weight in weights.values()]
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert np.array_equal(tensor.read().numpy(), wanted)
        assert torch.equal(torch.cat(list(decoded_pieces(tensor))), tensor.read())


def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("PIECE", "ROWS"):
        monkeypatch.setattr(f"secateur.checkpoints.quantised.onnx.{name}", 16)
    tensors = onnx_source(saved(quantised("nbits-4a", exported(matrices())), tmp_path / "model.onnx")).tensors
    for tensor in tensors:
        parts = list(decoded_pieces(tensor))
        assert len(parts) == tensor.shape[0] // 16
        assert torch.equal(torch.cat(parts), tensor.read())


# Held against the pruned checkpoint


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the matrices were in, with one that lies [in, out]."""
    folder = tmp_path_factory.mktemp("pruned")
    tensors = {name: weight.clone() for name, weight in matrices().items()}
    tensors["model.layers.0.other.weight"] = tensors["model.layers.0.other.weight"].T.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("way", ["", "nbits-4s", "nbits-2a", "hqq-4a", "qdq-4a"])
def test_matrices_are_found_by_their_numbers(way: str, pruned: Path, tmp_path: Path):
    weights = dict(sorted(matrices().items(), reverse=True))
    weights = {name: w for name, w in weights.items() if way[:3] != "hqq" or not w.shape[1] % 32}
    model = quantised(way, exported(weights)) if way else exported(weights)
    found = secateur.inspect(saved(model, tmp_path / "model.onnx"), against=pruned)
    assert [tensor.name for tensor in found.tensors] == list(weights)
    assert (found.coverage, found.record) == (None, None)
    half = sum(weight.numel() for weight in weights.values()) // 2
    assert found.against is not None
    if not way:
        assert found.against == Against(pruned=half, came_back=0, kept=half, vanished=0)
        assert found.sparsity == 0.5
    elif way == "hqq-4a":
        assert found.against.came_back > 0.9 * half
    else:
        assert found.against.came_back == 0
        assert found.against.vanished > 0
    if way != "hqq-4a":
        assert all("2:4" in tensor.patterns for tensor in found.tensors)


def test_another_checkpoint_is_refused(pruned: Path, tmp_path: Path):
    draw = torch.Generator().manual_seed(1)
    other = {name: torch.randn(weight.shape, generator=draw) for name, weight in matrices().items()}
    file = saved(exported(other), tmp_path / "model.onnx")
    with pytest.raises(
        BadCheckpoint, match=r"val_0 \[64, 48\] of .* which has no matrix like it\. Name the checkpoint"
    ):
        secateur.inspect(file, against=pruned)


def test_the_command_line_says_it(pruned: Path, tmp_path: Path):
    folder = saved(quantised("nbits-4s", exported(matrices())), tmp_path / "out" / "model.onnx", beside=True).parent
    said = " ".join(run("inspect", folder, "--against", pruned).split())
    assert "Stored as ONNX (MatMulNBits 4-bit, groups of 32); zeros are counted in what is decoded." in said
    assert "pruned weights 0 came back (0.00%)" in said
    document = json.loads(run("inspect", folder / "model.onnx", "--json"))
    assert [tensor["name"] for tensor in document["tensors"]] == [f"val_{i}_Q4" for i in range(4)]


# How a graph multiplies


def test_every_way_to_multiply_is_the_same_matrix(tmp_path: Path):
    """MatMul and Gemm, turned or not, cast, named twice, in a Constant and inside an If."""
    weight = matrices()["model.layers.0.up_proj.weight"].numpy()
    make = onnx.helper.make_node
    inner = onnx.helper.make_graph(
        [make("MatMul", ["x", "half"], ["z"], "/inner/MatMul")], "inner", [],
        [onnx.helper.make_tensor_value_info("z", FLOAT, None)],
    )  # fmt: skip
    nodes = [
        make("MatMul", ["x", "plain"], ["a"], "/model/layers.0/self_attn/q_proj/MatMul"),
        make("Gemm", ["x", "rows"], ["b"], "gemm", transB=1),
        make("Transpose", ["rows_2"], ["turned"], perm=[1, 0]),
        make("Cast", ["turned"], ["cast"], to=FLOAT),
        make("Identity", ["cast"], ["same"]),
        make("MatMul", ["x", "same"], ["c"], "chain"),
        make("Constant", [], ["inline"], value=onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T))),
        make("MatMul", ["x", "inline"], ["d"], "constant"),
        make("MatMul", ["x", "plain"], ["e"], "again"),
        make("MatMul", ["x", "a"], ["f"], "of two inputs"),
        make("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
    ]
    constants = {"plain": weight.T, "rows": weight, "rows_2": weight.astype(np.float16), "half": weight.T,
                 "yes": np.array(True)}  # fmt: skip
    source = onnx_source(saved(graph_of(nodes, constants), tmp_path / "model.onnx"))
    names = ["model.layers.0.self_attn.q_proj.weight", "rows", "rows_2", "inline", "inner.weight"]
    assert [tensor.name for tensor in source.tensors] == names
    assert source.format == "ONNX (F32, F16)"
    for tensor in source.tensors:
        wanted = torch.from_numpy(weight)
        assert torch.equal(tensor.read(), wanted.half() if tensor.stored == "F16" else wanted)


def one_node(kind: str, weight: np.ndarray, name: str = "w") -> Any:
    """A graph with one node that multiplies by a constant."""
    return graph_of([onnx.helper.make_node(kind, ["x", name], ["y"], "n")], {name: weight})


def products(change: Any = None, **attributes: int) -> Any:
    """A graph with one MatMulNBits of 8 × 32, its constants changed."""
    constants: dict[str, Any] = {"b": np.zeros((8, 1, 16), np.uint8), "s": np.ones((8, 1), np.float32)}
    sizes = {"N": 8, "K": 32, "bits": 4, "block_size": 32, **attributes}
    inputs = ["x", "b", "s"]
    if change is not None:
        constants, inputs = change(constants, inputs)
    node = onnx.helper.make_node("MatMulNBits", inputs, ["y"], "node", domain="com.microsoft", **sizes)
    return graph_of([node], constants)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: products(N=7), r"has B UINT8 \[8, 1, 16\]; 112 UINT8 were wanted for 7 × 32 in groups of 32"),
        (lambda: products(block_size=0), "has 4 bits, groups of 0, and a matrix of 8 × 32"),
        (lambda: products(bits=1), "has 1 bits, groups of 32"),
        (lambda: products(lambda c, i: ({**c, "s": np.ones((8, 2), np.float32)}, i)), r"has scales FLOAT \[8, 2\]; 8 "),
        (lambda: products(lambda c, i: ({**c, "z": np.ones(9, np.uint8)}, [*i, "z"])), r"has zero_points UINT8 \[9\]"),
        (lambda: products(lambda c, i: ({"b": c["b"]}, i)), "s belongs to a packed matrix and is no constant of the"),
        (
            lambda: products(lambda c, i: ({**c, "g": np.zeros(32, np.int32)}, [*i, "", "g"])),
            r"names the group of each input \(g_idx\), which is not read\. Quantise without reordering",
        ),
        (
            lambda: one_node("MatMulInteger", np.eye(4, dtype=np.int8)),
            "'n' multiplies by MatMulInteger, which is not read; MatMul, Gemm, MatMulNBits",
        ),
        (
            lambda: one_node("MatMul", np.eye(4, dtype=np.int32)),
            "MatMul 'n' has a matrix in INT32; one of FLOAT, FLOAT16, BFLOAT16, DOUBLE was wanted",
        ),
        (lambda: one_node("MatMul", np.ones(4, np.float32)), "multiplies by no constant matrix; a model was wanted"),
        (
            lambda: one_node("MatMul", np.eye(4), "a\x1b"),
            r"A matrix has the name 'a\\x1b', which is none",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model: Any, words: str, tmp_path: Path):
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=words):
        onnx_source(saved(model(), tmp_path / "model.onnx"))


# Files


def test_numbers_that_are_not_beside_the_graph(tmp_path: Path):
    file = saved(exported(matrices()), tmp_path / "model.onnx", beside=True)
    numbers = tmp_path / "numbers.data"
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:100])
    with pytest.raises(
        BadCheckpoint, match=r"val_0 lies at byte 0 of 'numbers\.data', and 12288 bytes are not there\."
    ):
        onnx_source(file).tensors[0].read()
    numbers.rename(tmp_path.parent / "elsewhere.data")
    model = onnx.load(str(file), load_external_data=False)
    for one in model.graph.initializer:
        next(entry for entry in one.external_data if entry.key == "location").value = "../elsewhere.data"
    onnx.save(model, str(file))
    with pytest.raises(BadCheckpoint, match=r"of '\.\./elsewhere\.data', and .* Put the file that was written with"):
        onnx_source(file).tensors[0].read()


def test_a_file_that_is_no_graph(tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(BadCheckpoint, match=r"model\.onnx is no sound ONNX file \("):
        secateur.inspect(file)


def test_which_file_is_meant(tmp_path: Path):
    file = saved(exported(matrices()), tmp_path / "one" / "model.onnx")
    assert onnx_file(file) == onnx_file(file.parent) == file
    assert onnx_file(tmp_path) is onnx_file(tmp_path / "nowhere.onnx") is None
    (file.parent / "decoder.onnx").write_bytes(file.read_bytes())
    with pytest.raises(BadCheckpoint, match=r"holds several ONNX files \(decoder\.onnx, model\.onnx\)\. Name one"):
        secateur.inspect(file.parent)
    (file.parent / "model.safetensors").touch()
    assert onnx_file(file.parent) is None


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = saved(exported(matrices()), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedModel, match=r"needs the package onnx: pip install 'secateur\[onnx\]'"):
        secateur.inspect(file)


def test_nodes_without_inputs_and_in_circles_are_no_sound_graph(tmp_path):
    """Found by bench/fuzz.py --kinds onnx."""
    node = onnx.helper.make_node
    lone = graph_of([node("MatMul", ["x"], ["y"], "lone")], {})
    with pytest.raises(BadCheckpoint, match=r"MatMul 'lone' has 1 inputs; 2 are wanted at least\."):
        secateur.inspect(saved(lone, tmp_path / "lone.onnx"))
    circle = [node("Identity", ["a"], ["b"]), node("Identity", ["b"], ["a"]), node("Identity", [], ["c"])]
    made = {name: node("MatMul", ["x", name], [f"y{name}"], f"by_{name}") for name in "ac"}
    with pytest.raises(BadCheckpoint, match="multiplies by no constant matrix"):
        secateur.inspect(saved(graph_of([*circle, *made.values()], {}), tmp_path / "circle.onnx"))


def test_names_that_are_no_text_and_numbers_that_are_missing(tmp_path):
    """Found by bench/fuzz.py --kinds onnx."""
    graph = exported({"w0": torch.ones(4, 4)})
    file = saved(graph, tmp_path / "sound.onnx")
    spoilt = tmp_path / "spoilt.onnx"
    spoilt.write_bytes(file.read_bytes().replace(b"node_val_0", b"node_val_\xff"))
    with pytest.raises(BadCheckpoint, match="has a name that is no text"):
        secateur.inspect(spoilt)
    graph.graph.initializer[0].dims[0] = -4
    with pytest.raises(BadCheckpoint, match=r"val_0 has the shape \[-4, 4\]"):
        secateur.inspect(saved(graph, tmp_path / "negative.onnx"))
    graph.graph.initializer[0].dims[0] = 4
    graph.graph.initializer[0].raw_data = b""
    with pytest.raises(BadCheckpoint, match="val_0 cannot be read: cannot reshape array of size 0"):
        secateur.inspect(saved(graph, tmp_path / "empty.onnx"))
