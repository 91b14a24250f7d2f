"""The peak anonymous memory of pruning a random bf16 Llama that is written in shards, above bare torch.

    python bench/memory.py --parameters 1.5e9 --out out/memory

Prints one JSON line. The model is written shard by shard, so making it needs no memory for it; the pruning runs in
a process of its own, and so does the bare interpreter with torch imported that it is compared with.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from secateur.demo import model_folder
from secateur.machine import machine, versions

BARE = """
import torch
from pathlib import Path
status = Path("/proc/self/status").read_text()
print(1024 * int(status.split("RssAnon:")[1].split()[0]))
"""
PRUNE = """
import sys, torch
from secateur.progress import PeakMemory
with PeakMemory() as peak:
    import secateur
    report = secateur.prune(sys.argv[1], out=sys.argv[2], method=sys.argv[3], pattern="2:4", calibration="demo",
                            samples=8, seq_len=256, overwrite=True)
print(peak.bytes, report.seconds.forward, report.seconds.statistics, report.seconds.solve, report.sparsity)
"""


def write_model(folder: Path, parameters: float) -> int:
    """A random Llama of about that many parameters in shards of four blocks; how many it has."""
    shutil.rmtree(folder, ignore_errors=True)
    hidden, ffn, vocabulary, heads = 2048, 5504, 32000, 16
    block = 4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden
    blocks = round((parameters - 2 * vocabulary * hidden) / block)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    draw, weight_map = torch.Generator().manual_seed(0), {}

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * columns**-0.5).bfloat16()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    save("model-ends.safetensors", {name: matrix(vocabulary, hidden) for name in ends} | {"model.norm.weight": ones})
    for start in range(0, blocks, 4):
        shard = {}
        for index in range(start, min(start + 4, blocks)):
            at = f"model.layers.{index}."
            shard |= {f"{at}self_attn.{n}_proj.weight": matrix(hidden, hidden) for n in "qkvo"}
            shard |= {f"{at}mlp.{n}_proj.weight": matrix(ffn, hidden) for n in ("gate", "up")}
            shard[f"{at}mlp.down_proj.weight"] = matrix(hidden, ffn)
            shard |= {f"{at}{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        save(f"model-{start:05d}.safetensors", shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return blocks * block + 2 * vocabulary * hidden + hidden


def run(code: str, *arguments: str) -> list[float]:
    """The numbers that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.5e9)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    chosen = parser.parse_args()
    count = write_model(chosen.out / "model", chosen.parameters)
    (bare,) = run(BARE)
    peak, forward, statistics, solve, sparsity = run(
        PRUNE, str(chosen.out / "model"), str(chosen.out / "pruned"), chosen.method
    )
    shutil.rmtree(chosen.out)
    print(
        json.dumps(
            {
                "parameters": count, "method": chosen.method, "tokens": 8 * 256, "sparsity": sparsity,
                "bare_bytes": bare, "peak_bytes": peak, "above_bare_gb": round((peak - bare) / 1e9, 3),
                "seconds": {"forward": forward, "statistics": statistics, "solve": solve},
                "machine": machine(), "versions": versions(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            }
        )
    )  # fmt: skip
