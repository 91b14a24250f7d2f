r"""The peak anonymous memory of pruning a random bf16 model that is written in shards, above bare torch.

    python bench/memory.py --parameters 1.5e9 --out out/memory
    python bench/memory.py --parameters 13e9 --hidden 5120 --samples 2 --seq-len 64 --limit 6e9 \
        --json bench/results/memory-13b.json
    python bench/memory.py --parameters 5e9 --experts 8 --samples 2 --seq-len 64 --limit 3.2e9 \
        --json bench/results/memory-experts.json

A Llama, or with `--experts` a Mixtral, whose experts are stored one by one. With `--limit` the pruning runs in a memory
control group of its own, where the system grants no byte more, mapped files and the cache of what is read and written
included (root and control groups are needed). Prints one JSON line. The model is written shard by shard, so making it
needs no memory for it; the pruning runs in a process of its own, and so does the bare interpreter with torch imported
that it is compared with.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import options, write
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

from secateur.data.demo import model_folder

POOL = 2**24 + 43
"""Random numbers that all matrices are cut from, at other places each: drawing billions would take longest of all."""
BARE = """
import torch
from pathlib import Path
status = Path("/proc/self/status").read_text()
print(1024 * int(status.split("RssAnon:")[1].split()[0]))
"""
PRUNE = """
import sys, torch
from secateur.system.memory import PeakMemory
with PeakMemory() as peak:
    import secateur
    report = secateur.prune(sys.argv[1], out=sys.argv[2], method=sys.argv[3], pattern="2:4", calibration="demo",
                            samples=int(sys.argv[4]), seq_len=int(sys.argv[5]), overwrite=True)
print(peak.bytes, report.seconds.forward, report.seconds.statistics, report.seconds.solve, report.sparsity)
"""


def write_model(folder: Path, parameters: float, hidden: int = 2048, experts: int = 0) -> int:
    """A random Llama or Mixtral of about that many parameters in shards of four blocks; how many it has."""
    shutil.rmtree(folder, ignore_errors=True)
    ffn, vocabulary, heads = {2048: 5504, 4096: 11008, 5120: 13824}[hidden], 32000, hidden // 128
    block = 4 * hidden * hidden + 3 * hidden * ffn * max(experts, 1) + 2 * hidden + experts * hidden
    blocks = round((parameters - 2 * vocabulary * hidden) / block)
    kind: Any = partial(MixtralConfig, num_local_experts=experts) if experts else LlamaConfig
    config = kind(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    draw, weight_map = torch.Generator().manual_seed(0), {}
    pool = torch.randn(POOL, generator=draw).bfloat16()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        start = int(torch.randint(POOL - columns, (), generator=draw))
        shifted = pool.roll(-start)
        repeated = shifted.repeat(-(-rows * columns // POOL))[: rows * columns]
        return repeated.view(rows, columns) * columns**-0.5

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
            for expert in range(experts):
                of = f"{at}block_sparse_moe.experts.{expert}."
                shard |= {f"{of}{n}.weight": matrix(ffn, hidden) for n in ("w1", "w3")}
                shard[f"{of}w2.weight"] = matrix(hidden, ffn)
            if experts:
                shard[f"{at}block_sparse_moe.gate.weight"] = matrix(experts, hidden)
            else:
                shard |= {f"{at}mlp.{n}_proj.weight": matrix(ffn, hidden) for n in ("gate", "up")}
                shard[f"{at}mlp.down_proj.weight"] = matrix(hidden, ffn)
            shard |= {f"{at}{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        save(f"model-{start:05d}.safetensors", shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return blocks * block + 2 * vocabulary * hidden + hidden


def run(code: str, *arguments: str, group: Path | None = None) -> list[float]:
    """The numbers that a fresh interpreter prints last; it runs in a control group where one is given."""

    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter
    )
    return [float(word) for word in done.stdout.split()]


@contextmanager
def limited(limit: float | None) -> Iterator[Path | None]:
    """A memory control group with that limit, in bytes; None without one."""
    if limit is None:
        yield None
        return
    base = Path("/sys/fs/cgroup/memory")
    base, name = (base, "memory.limit_in_bytes") if base.is_dir() else (base.parent, "memory.max")
    group = base / f"secateur-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(int(limit)))
        yield group
    finally:
        group.rmdir()


def most_of(group: Path | None) -> int | None:
    """The most memory that a control group has ever held, in bytes."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if group and (group / name).exists():
            return int((group / name).read_text())
    return None


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(parameters=1.5e9, hidden=2048, experts=0, method="wanda", samples=8, seq_len=256),
        dict(limit=float, out=Path("out/memory"), json=Path),
    )
    count = write_model(chosen.out / "model", chosen.parameters, chosen.hidden, chosen.experts)
    (bare,) = run(BARE)
    if chosen.limit:  # what is cached of the model was charged to this process, not to the group
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    began = perf_counter()
    with limited(chosen.limit) as group:
        peak, forward, statistics, solve, sparsity = run(
            PRUNE, str(chosen.out / "model"), str(chosen.out / "pruned"), chosen.method, str(chosen.samples),
            str(chosen.seq_len), group=group,
        )  # fmt: skip
        most = most_of(group)
    seconds = {"forward": forward, "statistics": statistics, "solve": solve, "all": perf_counter() - began}
    weights = sum(file.stat().st_size for file in (chosen.out / "model").glob("*.safetensors"))
    shutil.rmtree(chosen.out)
    about = {"parameters": count, "weight_bytes": weights, "method": chosen.method, "sparsity": sparsity}
    about |= {"tokens": chosen.samples * chosen.seq_len, "limit_bytes": chosen.limit, "group_peak_bytes": most}
    about |= {"bare_bytes": bare, "peak_bytes": peak, "above_bare_gb": round((peak - bare) / 1e9, 3)}
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    print(json.dumps(write(chosen.json, command=command, **about, seconds=seconds)))
