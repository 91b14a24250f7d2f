"""An ONNX graph with quantised products and numbers in a file beside it, and what may be wrong with such a folder."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch

from support.spoilt_json import NASTY

ONNX, NUMBERS = "model.onnx", "numbers.data"


def write_graph(folder: Path) -> None:
    """A folder with a graph of three products: one of floats, two of four bits, with zero points and without."""
    import numpy as np
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    draw = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(64, 64, generator=draw).numpy().astype(np.float32) for i in range(3)}
    floats, helper = onnx.TensorProto.FLOAT, onnx.helper
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"], f"node_{name}") for name in weights]
    nodes.append(helper.make_node("Sum", [f"y{name}" for name in weights], ["y"]))
    ends = [[helper.make_tensor_value_info(name, floats, None)] for name in "xy"]
    constants = [onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: Any = helper.make_model(
        helper.make_graph(nodes, "graph", *ends, constants), opset_imports=domains, ir_version=10
    )
    for symmetric, left in ((True, ["node_w1", "node_w2"]), (False, ["node_w2"])):
        settings: Any = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=4)
        made: Any = MatMulNBitsQuantizer(model, algo_config=settings, nodes_to_exclude=left)
        made.process()
        model = made.model.model
    folder.mkdir()
    beside: dict[str, Any] = dict(save_as_external_data=True, location=NUMBERS, size_threshold=0)
    onnx.save(model, str(folder / ONNX), **beside)


def spoil_onnx(folder: Path, draw: Random) -> str:
    """Change the graph, what it says of its constants, or the bytes of either file."""
    import onnx

    file = folder / draw.choice([ONNX, ONNX, ONNX, ONNX, NUMBERS])
    if file.name == NUMBERS or draw.random() < 0.3:
        return _spoil_bytes(file, draw)
    model: Any = onnx.load(str(file), load_external_data=False)
    what = draw.choice((_constant, _constant, _place, _place, _attribute, _node, _graph))(model, draw)
    file.write_bytes(model.SerializeToString())
    return f"{file.name}: {what}"


def _spoil_bytes(file: Path, draw: Random) -> str:
    data, at = bytearray(file.read_bytes()), 0
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        data[at] = draw.randrange(256)
    if draw.random() < 0.4:
        data = data[:at]
    file.write_bytes(data)
    return f"{file.name}: bytes at {at}, {len(data)} left"


SIZES = (0, 1, -1, 3, 32, 63, 65, 2**31, 2**40, 2**62)


def _constant(model: Any, draw: Random) -> str:
    """Another shape, type or name of a constant, or one that is gone or there twice."""
    constants = model.graph.initializer
    one = draw.choice(list(constants))
    what = draw.choice(["dims", "dims", "type", "name", "gone", "twice", "data"])
    if what == "dims":
        dims = list(one.dims) or [1]
        dims[draw.randrange(len(dims))] = draw.choice([*SIZES, *dims])
        del one.dims[:]
        one.dims.extend(dims[: draw.randint(0, len(dims))] if draw.random() < 0.2 else dims)
    elif what == "type":
        one.data_type = draw.choice([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 23, 99])
    elif what == "name":
        one.name = draw.choice(["", "w0", "a\nb", "\x1b[2J", "x" * 5000])
    elif what == "gone":
        constants.remove(one)
    elif what == "twice":
        constants.append(one)
    else:
        one.raw_data, one.data_location = bytes(draw.choice(SIZES[:7]) % 100), 0
    return f"{one.name[:20]!r} {what}"


def _place(model: Any, draw: Random) -> str:
    """Where the numbers of a constant lie: another file, offset or length."""
    one = draw.choice([one for one in model.graph.initializer if one.external_data])
    entry = draw.choice(list(one.external_data))
    outside = ["../sentinel/secret.txt", "/etc/hostname", "", ".", "no.data", "a\x00b", "x" * 500, NUMBERS, ONNX]
    entry.value = draw.choice(outside if entry.key == "location" else [*map(str, SIZES), "", "x", "1e3", "9" * 30])
    if draw.random() < 0.1:
        entry.key = draw.choice(["", "offset", "location", "basepath"])
    return f"{entry.key} = {entry.value[:30]!r}"


def _attribute(model: Any, draw: Random) -> str:
    """Another number in what an operator says of its weights."""
    node = draw.choice([node for node in model.graph.node if node.attribute])
    attribute = draw.choice(list(node.attribute))
    if draw.random() < 0.2:
        node.attribute.remove(attribute)
        return f"without {attribute.name}"
    if draw.random() < 0.2:
        attribute.type = draw.choice(range(15))
    attribute.i = draw.choice([*SIZES, 2, 4, 8, 16, 128])
    return f"{attribute.name} = {attribute.i}"


def _node(model: Any, draw: Random) -> str:
    """Another operator or domain, or other inputs."""
    node = draw.choice(list(model.graph.node))
    what = draw.choice(["op_type", "domain", "input", "fewer", "gone", "loop"])
    if what in ("op_type", "domain"):
        names = ["MatMul", "MatMulNBits", "Gemm", "MatMulInteger", "DequantizeLinear", "If", "", "a\nb", "\x1b[31m"]
        setattr(node, what, draw.choice([*names, "com.microsoft", "ai.onnx"]))
    elif what == "input" and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(["", "x", "y", "w0", "no", "a\nb"])
    elif what == "fewer" and node.input:
        del node.input[draw.randrange(len(node.input)) :]
    elif what == "loop" and node.output:
        node.input.append(node.output[0])
    else:
        model.graph.node.remove(node)
    return f"{node.name[:20]!r} {what}"


def _graph(model: Any, draw: Random) -> str:
    """No graph, no versions, or a name that cannot be printed."""
    what = draw.choice(["graph", "opset", "version", "names", "nasty"])
    if what == "graph":
        model.ClearField("graph")
    elif what == "opset":
        del model.opset_import[:]
    elif what == "version":
        model.ir_version = draw.choice(SIZES)
    elif what == "names":
        for node in model.graph.node:
            node.name = draw.choice(["", "same", "\x1b[2J", "\u202eabc"])
    else:
        model.graph.doc_string = str(draw.choice(NASTY))
    return what
