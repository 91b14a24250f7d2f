"""ONNX Runtime on the CPU: the graph of formats/onnx.py, its keys and values fed back run by run.

Zeros are multiplied like all other numbers; only a smaller model is faster. float32 alone: the CPU
provider has no bfloat16 kernels for these graphs.
"""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.deployment.formats.onnx import FILE, PACKAGES, empty_cache, export
from secateur.deployment.runtimes.base import (
    Running,
    Runtime,
    bytes_read,
    load_model,
    not_installed,
)
from secateur.errors import UnsupportedModel


def missing() -> str | None:
    return not_installed(("onnxruntime", *PACKAGES), "'secateur[onnx]'")


def load(folder: Path, dtype: torch.dtype) -> Running:
    """Raises UnsupportedModel for other dtypes than float32 and what cannot be exported."""
    if dtype != torch.float32:
        raise UnsupportedModel(
            "ONNX Runtime's CPU provider computes these graphs in float32 only; "
            f"{dtype} was asked for."
        )
    onnxruntime = import_module("onnxruntime")
    model = load_model(folder, dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin for more work after a run would slow down whatever has the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / FILE
        export(model, file)
        providers = ["CPUExecutionProvider"]
        return Session(onnxruntime.InferenceSession(str(file), options, providers), model)


class Session(Running):
    """A session; keys and values stay ONNX Runtime's own tensors, which are not copied out."""

    def __init__(self, session: Any, model: PreTrainedModel) -> None:
        super().__init__(model.config.get_text_config().vocab_size, bytes_read(model))
        self.session = session
        self.empty = [tensor.numpy() for side in empty_cache(model, 1) for tensor in side]
        self.past_names = [tensor.name for tensor in session.get_inputs()][1:]
        self.past: dict[str, Any] = {}

    def prefill(self, ids: Tensor) -> Tensor:
        empty = [_value(array.repeat(len(ids), axis=0)) for array in self.empty]
        self.past = dict(zip(self.past_names, empty, strict=True))
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        inputs = {"ids": _value(ids.numpy()), **self.past}
        logits, *present = self.session.run_with_ort_values(None, inputs)
        self.past = dict(zip(self.past_names, present, strict=True))
        return torch.from_numpy(logits.numpy())


def _value(array: Any) -> Any:
    return import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)


onnxruntime = Runtime(missing, load, packages=("onnxruntime",))
