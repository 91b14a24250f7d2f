"""ONNX: one graph for ONNX Runtime and TensorRT that serves prefill and decoding alike.

Inputs are `ids` int64 [batch, length] and, for every block, `past_key_i` and `past_value_i` [batch,
heads, past, size], where `past` may be 0; outputs are `logits` [batch, vocabulary] after the last
token, and `key_i` and `value_i` of all tokens so far, to be fed back. Weights are float32 in
`model.onnx.data`; a runtime rounds them to what it computes in.

Zeros are the point: TensorRT looks for 2:4 in the constants that a MatMul or Gemm contracts with
(`trtexec --sparsity=enable`), so after the export every matrix with zeros is looked up in the
graph, by its values and along the contracted axis, and one that is not there is an error. The
logits are compared with transformers' as well. Both checks are written to `onnx.json`, with what
they found.

Models whose cache is more than keys and values (state spaces, linear attention) are refused, and so
are those with fused experts, whose slices are no constants of their own.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from secateur.checkpoints.folder import Checkpoint
from secateur.deployment.formats.base import Format, refuse_odd_values
from secateur.errors import BadPattern, UnsupportedModel, in_one_line
from secateur.methods.patterns import TWO_OF_FOUR
from secateur.models.load import find_stack, load_config
from secateur.models.matrices import weight_matrices
from secateur.models.parts import loader, other_parts
from secateur.system.files import disk_errors
from secateur.system.json_files import write_json

FILE, NOTE = "model.onnx", "onnx.json"
PACKAGES = ("onnx", "onnxscript")
MOST = 1e-4
"""The largest relative difference of logits from transformers', ‖a − b‖ / ‖b‖."""
MOST_BY_REFERENCE = 50_000_000
"""Parameters up to which onnx's own evaluator, slow and in Python, stands in for ONNX Runtime."""

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


class Steps(nn.Module):
    """A causal LM with the keys and values of earlier tokens as plain inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        cache = DynamicCache()
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, index)
        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: Any = cache.layers
        present = [layer.keys for layer in layers], [layer.values for layer in layers]
        return output.logits[:, -1], *present


def write(source: Checkpoint, folder: Path) -> None:
    """Write graph, data and note. Raises UnsupportedModel; BadPattern where zeros were lost."""
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise UnsupportedModel(
            f"ONNX needs the package {' and '.join(absent)}. "
            "Install it: pip install 'secateur[onnx]'."
        )
    model = (
        loader(load_config(source.folder))
        .from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
        .eval()
    )
    stack = find_stack(model)
    blocks: Any = model.get_submodule(stack)
    matrices = {
        f"{stack}.{index}.{name}": matrix
        for index, block in enumerate(blocks)
        for name, matrix in weight_matrices(block).items()
    }
    if any(matrix.expert for matrix in matrices.values()):
        raise UnsupportedModel(
            f"{source.folder} has fused experts, whose matrices are no constants of an ONNX graph."
        )
    pruned = {name: m.weight for name, m in matrices.items() if (m.weight == 0).any()}
    for name, weight in pruned.items():
        refuse_odd_values(name, weight, "TensorRT")
    with disk_errors(folder):
        export(model, folder / FILE)
        refuse_lost_zeros(pruned, folder / FILE)
        note = {
            "versions": {name: version(name) for name in ("torch", *PACKAGES)},
            "matrices_with_zeros": len(pruned),
            "matrices_in_2:4": sum(TWO_OF_FOUR.holds(weight) for weight in pruned.values()),
            **compare(model, folder / FILE),
            **({"left_out": sorted(others)} if (others := other_parts(model)) else {}),
        }
        write_json(folder / NOTE, note)


@torch.no_grad()
def empty_cache(
    model: PreTrainedModel, batch: int, past: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of zeros, `[batch, heads, past, size]` a layer. Raises UnsupportedModel."""
    cache: Any = DynamicCache()
    try:
        model(torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
        sides = zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
        keys, values = (
            [tensor.new_zeros(batch, tensor.shape[1], past, tensor.shape[3]) for tensor in side]
            for side in sides
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps other things than keys and values of every block."
        ) from error
    return keys, values


def export(model: PreTrainedModel, file: Path) -> None:
    """Write the graph of a float32 model. Raises UnsupportedModel where torch cannot export it."""
    # Sizes that no constant of a model has: a size of 1 would become fixed.
    keys, values = empty_cache(model, 2, 7)
    batch, past, length = (torch.export.Dim(name) for name in ("batch", "past", "length"))
    sizes = [{0: batch, 2: past} for _ in keys]
    numbers = range(len(keys))
    past_names = [f"past_{kind}_{i}" for kind in ("key", "value") for i in numbers]
    present_names = [f"{kind}_{i}" for kind in ("key", "value") for i in numbers]
    try:
        with _quiet():
            torch.onnx.export(
                Steps(model).eval(),
                (torch.zeros(2, 5, dtype=torch.long), keys, values),
                file,
                input_names=["ids", *past_names],
                output_names=["logits", *present_names],
                dynamic_shapes={"ids": {0: batch, 1: length}, "keys": sizes, "values": sizes},
                external_data=True,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModel(
            f"torch cannot export {type(model).__name__} as ONNX: {in_one_line(error)}."
        ) from error
    _forget_sources(file)


def _forget_sources(file: Path) -> None:
    """Take out of a graph what the exporter notes at every node: paths and lines of the source on
    this machine, which tell who made a file and make it another one on every machine.
    """
    onnx = import_module("onnx")
    model = onnx.load(str(file), load_external_data=False)
    for part in (model.graph, *model.functions):
        for node in part.node:
            del node.metadata_props[:]
    onnx.save(model, str(file))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on names of axes and on packages that are not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def refuse_lost_zeros(weights: dict[str, Tensor], file: Path) -> None:
    """Raise BadPattern unless the graph multiplies by each of these `[out, in]`, along `in`."""
    present = {sha256(matrix.tobytes()).digest() for matrix in multiplied(file)}
    for name, weight in weights.items():
        if sha256(weight.float().numpy().tobytes()).digest() not in present:
            raise BadPattern(
                f"{name} has zeros along its {weight.shape[1]} inputs, but no MatMul or Gemm of "
                f"{file.name} contracts with that matrix: the export changed it. "
                "Try another version of torch."
            )


def multiplied(file: Path) -> Iterator[np.ndarray]:
    """Every constant of a MatMul or Gemm, as `[out, in]`: the contracted axis last."""
    onnx = import_module("onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        contracted_last = any(a.name == "transB" and a.i for a in node.attribute)
        name = node.input[1]
        if turned.get(name) in constants:
            name, contracted_last = turned[name], not contracted_last
        if name in constants:
            matrix = onnx.numpy_helper.to_array(constants[name], base_dir=str(file.parent))
            yield matrix if contracted_last else matrix.T


@torch.no_grad()
def compare(model: PreTrainedModel, file: Path) -> dict[str, Any]:
    """How far the graph's logits are from the model's, and by what. Raises UnsupportedModel."""
    name, run = _evaluator(model, file)
    if run is None:
        return {"logits_checked_by": None}
    draw = torch.Generator().manual_seed(0)
    worst, (keys, values) = 0.0, empty_cache(model, 2)
    for length in (12, 1, 3):  # from an empty cache, then one token more, then several
        ids = torch.randint(model.config.get_text_config().vocab_size, (2, length), generator=draw)
        got = torch.from_numpy(run([tensor.numpy() for tensor in (ids, *keys, *values)])[0])
        wanted, keys, values = Steps(model)(ids, keys, values)
        worst = max(worst, ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item())
    if not worst <= MOST:
        raise UnsupportedModel(
            f"{name} computes logits from {file.name} that differ by {worst:.1e} of their norm."
        )
    return {"logits_checked_by": name, "largest_relative_difference": worst}


def _evaluator(model: PreTrainedModel, file: Path) -> tuple[str, Run | None]:
    """What runs the graph here, by name; None where that would take too long."""
    if find_spec("onnxruntime") is not None:
        runtime = import_module("onnxruntime")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names, name = [given.name for given in session.get_inputs()], "onnxruntime"
    elif model.num_parameters() > MOST_BY_REFERENCE:
        return "nothing", None
    else:
        session = import_module("onnx.reference").ReferenceEvaluator(str(file))
        names, name = session.input_names, "onnx"
    return f"{name} {version(name)}", lambda x: session.run(None, dict(zip(names, x, strict=True)))


onnx = Format(
    write,
    "ONNX Runtime (tried: 1.32); TensorRT by trtexec --sparsity=enable (not tried)",
    packages=("onnx",),
)
