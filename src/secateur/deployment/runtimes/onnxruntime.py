"""ONNX Runtime on the CPU: the graph of formats/onnx.py, whose keys and values go from one run into
the next.

Zeros are multiplied like all other numbers; only a smaller model is faster. float32 alone: the CPU
provider has no bfloat16 kernels for these graphs.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.deployment.formats.onnx import FILE, PACKAGES, empty_cache, export
from secateur.deployment.runtimes.base import Running, Runtime
from secateur.deployment.runtimes.eager import bytes_read, load_model
from secateur.errors import UnsupportedModel


def missing() -> str | None:
    absent = [name for name in ("onnxruntime", *PACKAGES) if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'secateur[onnx]'" if absent else None


def load(folder: Path, dtype: torch.dtype) -> Running:
    """Raises UnsupportedModel for another dtype than float32, and where the model cannot be
    exported.
    """
    if dtype != torch.float32:
        raise UnsupportedModel(
            f"ONNX Runtime's CPU provider computes these graphs in float32 only; {dtype} was asked for."
        )
    onnxruntime = import_module("onnxruntime")
    model = load_model(folder, dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin for more work after a run would slow down whatever runtime has the next
    # turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with TemporaryDirectory() as temporary:
        export(model, Path(temporary) / FILE)
        session = onnxruntime.InferenceSession(
            str(Path(temporary) / FILE), options, providers=["CPUExecutionProvider"]
        )
    return Session(
        session, model.config.get_text_config().vocab_size, bytes_read(model), empty_cache(model, 1)
    )


class Session:
    """A session as `Running`; keys and values stay ONNX Runtime's own tensors, which are not copied
    out.
    """

    def __init__(
        self,
        session: Any,
        vocabulary: int,
        weight_bytes: int,
        empty: tuple[list[Tensor], list[Tensor]],
    ) -> None:
        self.session, self.vocabulary, self.weight_bytes, self.room = (
            session,
            vocabulary,
            weight_bytes,
            64,
        )
        self.empty = [tensor.numpy() for side in empty for tensor in side]
        self.past_names = [held.name for held in session.get_inputs()][1:]
        self.past: dict[str, Any] = {}

    def prefill(self, ids: Tensor) -> Tensor:
        empty = [tensor.repeat(len(ids), axis=0) for tensor in self.empty]
        self.past = {
            name: self._held(tensor) for name, tensor in zip(self.past_names, empty, strict=True)
        }
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        logits, *present = self.session.run_with_ort_values(
            None, {"ids": self._held(ids.numpy()), **self.past}
        )
        self.past = dict(zip(self.past_names, present, strict=True))
        return torch.from_numpy(logits.numpy())

    def _held(self, array: Any) -> Any:
        return import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)


onnxruntime = Runtime(missing, load)
