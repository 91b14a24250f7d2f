"""What it costs to compare a loaded model with its checkpoint, and to inspect one, beside reading the files.

    python bench/opening.py --json bench/results/opening.json

Two random models of about 1 GB in bfloat16: a Llama, whose tensors stay in the mapped file, and a Mixtral, whose
experts transformers stacks into new tensors. The files are read once before, so the disk plays no part. Of several
rounds the fastest counts, in seconds and in seconds of processors, which other work on the machine changes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import options, write
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.models.load import load
from secateur.models.source import check_loaded

SIZES: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=256
)
CONFIGS = {
    "Llama": LlamaConfig(**SIZES, num_hidden_layers=32, intermediate_size=4096),
    "Mixtral": MixtralConfig(**SIZES, num_hidden_layers=10, intermediate_size=2048, num_local_experts=8),
}


def fastest(rounds: int, run: Callable[[], Any]) -> dict[str, float]:
    """The seconds that a run takes at least, and those of processors."""
    seconds, cpu = [], []
    for _ in range(rounds):
        begin, own = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - own)
    return {"seconds": min(seconds), "cpu": min(cpu)}


def read(folder: Path) -> None:
    buffer = bytearray(2**24)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def measured(config: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """The bytes of a random model that is saved in a folder, and what each thing takes."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    del model
    checkpoint = open_checkpoint(folder)
    read_in = fastest(rounds, lambda: read(folder))
    loaded = load(folder)
    return {
        "bytes": checkpoint.bytes,
        "read": read_in,
        "compared": fastest(rounds, lambda: check_loaded(checkpoint, loaded)),
        "inspected": fastest(rounds, lambda: secateur.inspect(folder)),
    }


def main() -> None:
    given = options(__doc__, dict(json=Path, rounds=3))
    results = {}
    for name, config in CONFIGS.items():
        with TemporaryDirectory() as folder:
            results[name] = one = measured(config, Path(folder), given.rounds)
        ten = {
            (what, kind): 10e9 / one["bytes"] * one[what][kind]
            for what in ("read", "compared", "inspected")
            for kind in ("seconds", "cpu")
        }
        words = ", ".join(f"{w} {ten[w, 'seconds']:.2f} s ({ten[w, 'cpu']:.2f} of processors)" for w in list(one)[1:])
        rate = one["read"]["seconds"] / one["inspected"]["seconds"]
        size = f"{name}: {one['bytes'] / 1e9:.2f} GB"
        print(f"{size}; for 10 GB: {words}; inspected at {rate:.0%} of reading's rate", flush=True)
    write(given.json, results=results)


if __name__ == "__main__":
    main()
