"""llama.cpp on the CPU, through llama-cpp-python: what most people run a model with at home.

A folder is written as GGUF first (formats/gguf.py), float32 as f32 and bfloat16 as bf16.
`llamacpp_q8` writes Q8_0, eight bits and a scale for 32 weights, `llamacpp_q4` the matrices of the
blocks in Q4_0, four bits and a scale for 32, so that their logits are those of rounded weights.
With f32, attention is exact and keys and values are float32; else it is as llama.cpp's default, in
float16.

Each row of a batch is a sequence of its own. Zeros are multiplied like all other numbers.
"""

import logging
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.formats.gguf import FILE, gguf_package, write_gguf
from secateur.deployment.runtimes.base import Running, Runtime, not_installed
from secateur.errors import BadPattern, UnsupportedModel

VALUES = {torch.float32: "f32", torch.bfloat16: "bf16"}
UNIT = 256
"""llama.cpp makes room for multiples of so many tokens."""
MOST_ROWS = 256
"""Sequences that llama.cpp keeps apart in one context."""


def missing() -> str | None:
    return not_installed(("gguf", "llama_cpp"), "'secateur[llamacpp]'")


def load(folder: Path, dtype: torch.dtype, *, rounded: str | None = None) -> Running:
    """Raises UnsupportedModel for what cannot be written as GGUF, or llama.cpp does not load."""
    llama_cpp = import_module("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it prints a page a model
    with TemporaryDirectory() as temporary:  # the mapped file stays readable after its name is gone
        file = Path(temporary) / FILE
        values = rounded or VALUES[dtype]
        try:
            write_gguf(open_checkpoint(folder), file, values=values, vocabulary=False)
        except BadPattern as error:  # rows that blocks do not fit are no fault of the model
            raise UnsupportedModel(str(error)) from error
        tensors = {tensor.name: tensor for tensor in gguf_package().GGUFReader(file).tensors}
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise UnsupportedModel(
            f"llama.cpp does not load what was written of {folder}. "
            "Export the folder as gguf and ask llama-cli why."
        )
    looked_up = "token_embd.weight" if "output.weight" in tensors else None
    read = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name != looked_up)
    vocabulary = int(tensors["token_embd.weight"].shape[1])
    exact = dtype == torch.float32 and not rounded
    return Sequences(llama_cpp, model, vocabulary, read, exact=exact)


class Sequences(Running):
    """A llama.cpp model; a context is made for the first prompt that needs one of its size."""

    def __init__(
        self, library: Any, model: Any, vocabulary: int, weight_bytes: int, *, exact: bool
    ) -> None:
        super().__init__(vocabulary, weight_bytes)
        self.library, self.model, self.exact = library, model, exact
        self.context: Any = None
        self.rows = self.capacity = self.length = 0

    def prefill(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        if rows > MOST_ROWS:
            raise UnsupportedModel(
                f"llama.cpp keeps at most {MOST_ROWS} sequences apart; "
                f"a batch of {rows} was asked for."
            )
        if self.context is None or rows != self.rows or length + self.room > self.capacity:
            self._make_context(rows, -(-(length + self.room) // UNIT) * UNIT)
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        self.length = 0
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        if (total := self.length + length) > self.capacity:
            raise UnsupportedModel(
                f"The context of llama.cpp was made for {self.capacity} tokens; "
                f"{total} are too many."
            )
        batch = self.library.llama_batch_init(rows * length, 0, 1)
        try:
            self._fill(batch, ids)
            status = self.library.llama_decode(self.context, batch)
        finally:
            self.library.llama_batch_free(batch)
        if status:
            raise UnsupportedModel(
                f"llama.cpp could not compute {length} tokens of {rows} sequences "
                f"(status {status})."
            )
        self.length = total
        logits = self.library.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (rows, self.vocabulary)).copy())

    def _fill(self, batch: Any, ids: Tensor) -> None:
        """One row after the other; logits are wanted of the last token of each."""
        rows, length = ids.shape
        count = batch.n_tokens = rows * length
        last = np.arange(count) % length == length - 1
        positions = np.tile(np.arange(self.length, self.length + length), rows)
        np.ctypeslib.as_array(batch.token, (count,))[:] = ids.flatten().numpy()
        np.ctypeslib.as_array(batch.pos, (count,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (count,))[:] = last
        for index in range(count):
            batch.seq_id[index][0] = index // length

    def _make_context(self, rows: int, capacity: int) -> None:
        if self.context is not None:
            self.library.llama_free(self.context)
        settings = self.library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = rows * capacity
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        if self.exact:
            settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
            # Flash attention rounds to half precision whatever the cache: 1e-3 of the logits' norm.
            settings.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise UnsupportedModel(
                f"llama.cpp makes no context for {rows} sequences of {capacity} tokens."
            )
        self.rows, self.capacity = rows, capacity

    def __del__(self) -> None:
        if self.context:
            self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


llamacpp = Runtime(missing, load, packages=("llama-cpp-python",))
llamacpp_q8 = Runtime(missing, partial(load, rounded="q8_0"), rounded="int8")
llamacpp_q4 = Runtime(missing, partial(load, rounded="int4 of group 32"), rounded="int4")
