"""Does a smaller model run in llama.cpp? Its greedy tokens there and in transformers, from the same prompts.

    pip install gguf llama-cpp-python
    python bench/gguf_check.py --json bench/results/gguf.json

The demo model is shrunk in several ways and each result is written as GGUF in float32, with the names, the order of
query and key rows and the metadata that llama.cpp's own converter gives a Llama (a Mistral is the same to it). The
file is read back with the `gguf` reader and compared tensor for tensor, then run by llama-cpp-python where that is
installed.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.machine import machine, versions
from secateur.progress import Progress

PROMPTS = (
    "def read(self, size=-1):\n",
    "The module provides",
    "import os\nimport sys\n\n\nclass Parser:\n",
    "    for name in sorted(names):\n        if",
    "Return the number of",
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Every tensor by its GGUF name; rows of query and key in the order of llama.cpp's rotation."""
    config, found = model.config, {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            short = NAMES[rest.removesuffix(".weight")]
            if short in heads:  # pairs (i, i + half) become neighbours
                value = value.reshape(heads[short], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            found[f"blk.{index}.{short}.weight"] = value
        elif name == "model.embed_tokens.weight":
            found["token_embd.weight"] = value
        elif name == "model.norm.weight":
            found["output_norm.weight"] = value
        elif name == "lm_head.weight" and not config.tie_word_embeddings:
            found["output.weight"] = value
    return found


def write(folder: Path, file: Path) -> dict[str, np.ndarray]:
    """Write the model of a checkpoint folder as GGUF; returns what was written."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    by_id = sorted(held["vocab"], key=lambda token: held["vocab"][token])
    by_id += [f"[unused{i}]" for i in range(len(by_id), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(by_id)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(by_id))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in held["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    found = tensors(model)
    for name, value in found.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def check(folder: Path, file: Path, tokens: int) -> dict[str, object]:
    """Whether the file holds the model, and whether llama.cpp says what transformers says."""
    written = write(folder, file)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    equal = read.keys() == written.keys() and all(
        np.array_equal(np.asarray(read[name].data).reshape(value.shape), value) for name, value in written.items()
    )
    line: dict[str, object] = {"tensors": len(written), "reader_agrees": equal}
    try:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return line | {"llama_cpp": f"not installed: {error}"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = Llama(str(file), n_ctx=256, n_threads=1, verbose=False)
    same = total = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            wanted = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        other.reset()
        got = []
        for token in other.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0):
            got.append(token)
            if len(got) == tokens:
                break
        same += sum(a == b for a, b in zip(got, wanted.tolist(), strict=True))
        total += tokens
    return line | {"same_tokens": same, "of": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", default="25% of channels,50% of heads,1 block,1 block + 50% of channels")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    lines = {}
    with TemporaryDirectory() as temporary:
        for number, pattern in enumerate(chosen.patterns.split(",")):
            folder = Path(temporary) / str(number)
            secateur.prune(out=folder, method="fast", pattern=pattern, samples=32, progress=Progress())
            lines[pattern] = check(folder, Path(temporary) / f"{number}.gguf", chosen.tokens)
            print(pattern, lines[pattern], flush=True)
    found = {}
    for name in ("gguf", "llama-cpp-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if chosen.json:
        held = {"machine": machine(), "versions": versions() | found, "lines": lines}
        chosen.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
