"""Does a smaller model run in llama.cpp? Its greedy tokens there and in transformers, from the same prompts.

    pip install 'secateur[gguf,llamacpp]'
    python bench/gguf_check.py --json bench/results/gguf.json

The demo model is shrunk in several ways and each result is written as GGUF in float32 (formats/gguf.py). The file is
read back with the `gguf` reader and compared tensor for tensor with the model that transformers loads, then run by
llama-cpp-python where that is installed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import options, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.deployment.formats import gguf as gguf_format
from secateur.deployment.formats.gguf import FILE, gguf_package
from secateur.deployment.runtimes.llamacpp import llamacpp
from secateur.system.machine import versions
from secateur.system.progress import Progress

PROMPTS = (
    "def read(self, size=-1):\n",
    "The module provides",
    "import os\nimport sys\n\n\nclass Parser:\n",
    "    for name in sorted(names):\n        if",
    "Return the number of",
)


def agrees(model: Any, file: Path) -> tuple[int, bool]:
    """(tensors in the file, whether they are those of the model, rows of query and key put back in its order)."""
    gguf, config = gguf_package(), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    read = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    stored = dict(model.state_dict())
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    equal = len(read) == len(stored)
    for name, tensor in stored.items():
        value = read.get(names.get_name(name, try_suffixes=(".weight",)), np.empty(0)).reshape(tensor.shape)
        if count := heads.get(name.split(".")[-2]):
            value = value.reshape(count, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        equal = equal and np.array_equal(value, tensor.numpy())
    return len(read), equal


def same_tokens(model: Any, folder: Path, file: Path, tokens: int) -> int:
    """How many of `tokens` greedy tokens after each prompt are the same in llama.cpp."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    tokenizer, other, same = (
        AutoTokenizer.from_pretrained(folder),
        Llama(str(file), n_ctx=256, n_threads=1, verbose=False),
        0,
    )
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        other.reset()
        drawn = other.generate(other.tokenize(prompt.encode(), add_bos=True), temp=0.0, repeat_penalty=1.0)
        same += sum(next(drawn) == token for token in wanted.tolist())
    other.close()
    return same


def check(folder: Path, tokens: int) -> dict[str, object]:
    """Whether the file holds the model, and whether llama.cpp says what transformers says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with TemporaryDirectory() as temporary:
        gguf_format.write(open_checkpoint(folder), Path(temporary), values="f32")
        count, equal = agrees(model, Path(temporary) / FILE)
        line: dict[str, object] = {"tensors": count, "reader_agrees": equal}
        if (reason := llamacpp.missing()) is not None:
            return line | {"llama_cpp": reason}
        return line | {
            "same_tokens": same_tokens(model, folder, Path(temporary) / FILE, tokens), "of": tokens * len(PROMPTS),
        }  # fmt: skip


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(patterns="25% of channels,50% of heads,1 block,1 block + 50% of channels"),
        dict(tokens=64, json=Path),
    )
    lines = {}
    with TemporaryDirectory() as temporary:
        for number, pattern in enumerate(chosen.patterns.split(",")):
            folder = Path(temporary) / str(number)
            secateur.prune(out=folder, method="fast", pattern=pattern, samples=32, progress=Progress())
            lines[pattern] = check(folder, chosen.tokens)
            print(pattern, lines[pattern], flush=True)
    found = {}
    for name in ("gguf", "llama-cpp-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    write(chosen.json, versions=versions() | found, lines=lines)
