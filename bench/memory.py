r"""The peak anonymous memory of pruning a random bf16 model that is written in shards, above bare torch.

    python bench/memory.py --parameters 1.5e9 --out out/memory
    python bench/memory.py --parameters 13e9 --hidden 5120 --samples 2 --seq-len 64 --limit 6e9 \
        --json bench/results/memory-13b.json
    python bench/memory.py --parameters 5e9 --experts 8 --samples 2 --seq-len 64 --limit 3.2e9 \
        --json bench/results/memory-experts.json
    python bench/memory.py --parameters 5e9 --experts 8 --samples 2 --seq-len 64 --limit 3.2e9 --stored fp8 \
        --json bench/results/memory-fp8.json

A Llama, or with `--experts` a Mixtral, whose experts are stored one by one; `--stored fp8` in blocks of 128 x 128,
`--stored mxfp4` a gpt-oss instead, whose experts are in MXFP4. What they are unpacked to lies in `--out`.

With `--limit` the pruning runs in a memory control group of its own, where the system grants no byte more, mapped files
and the cache of what is read and written included (root and control groups are needed). Prints one JSON line. The model
is written shard by shard, so making it needs no memory for it; the pruning runs in a process of its own, and so does
the bare interpreter with torch imported that it is compared with.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import options, write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig, MixtralConfig

from secateur.data.demo import model_folder

POOL = 2**24 + 43
"""Random numbers that all matrices are cut from, at other places each: drawing billions would take longest of all."""
VOCABULARY = 32000
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


def configured(parameters: float, hidden: int, experts: int, stored: str) -> tuple[Any, int]:
    """The configuration of a model of about that many parameters, and how many a block of it has."""
    ffn, heads = {2048: 5504, 4096: 11008, 5120: 13824}[hidden], hidden // 128
    block = 4 * hidden * hidden + 3 * hidden * ffn * max(experts, 1) + 2 * hidden + experts * hidden
    blocks = round((parameters - 2 * VOCABULARY * hidden) / block)
    kind: Any = partial(MixtralConfig, num_local_experts=experts) if experts else LlamaConfig
    if stored == "mxfp4":
        kind = partial(GptOssConfig, num_local_experts=experts, num_experts_per_tok=2, head_dim=128, pad_token_id=0)
    config = kind(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    name = {"llama": "Llama", "mixtral": "Mixtral", "gpt_oss": "GptOss"}[config.model_type]
    config.architectures = [f"{name}ForCausalLM"]
    return config, block


class Numbers:
    """Random matrices, cut from a pool."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.pool = torch.randn(POOL, generator=self.draw).bfloat16()
        self.bytes = torch.randint(256, (POOL,), generator=self.draw, dtype=torch.uint8)

    def cut(self, pool: torch.Tensor, *shape: int) -> torch.Tensor:
        start = int(torch.randint(POOL - shape[-1], (), generator=self.draw))
        return pool.roll(-start).repeat(-(-prod(shape) // POOL))[: prod(shape)].view(shape)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return self.cut(self.pool, rows, columns) * columns**-0.5


def llama_block(config: Any, numbers: Numbers) -> dict[str, torch.Tensor]:
    """The tensors of a block of a Llama or a Mixtral."""
    hidden, ffn, experts = config.hidden_size, config.intermediate_size, getattr(config, "num_local_experts", 0)
    block = {f"self_attn.{n}_proj.weight": numbers.matrix(hidden, hidden) for n in "qkvo"}
    for expert in range(experts):
        of = f"block_sparse_moe.experts.{expert}."
        block |= {f"{of}{n}.weight": numbers.matrix(ffn, hidden) for n in ("w1", "w3")}
        block[f"{of}w2.weight"] = numbers.matrix(hidden, ffn)
    if experts:
        block["block_sparse_moe.gate.weight"] = numbers.matrix(experts, hidden)
    else:
        block |= {f"mlp.{n}_proj.weight": numbers.matrix(ffn, hidden) for n in ("gate", "up")}
        block["mlp.down_proj.weight"] = numbers.matrix(hidden, ffn)
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    return block | {f"{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}


def gpt_oss_block(config: Any, numbers: Numbers) -> dict[str, torch.Tensor]:
    """The tensors of a block of a gpt-oss, experts in MXFP4."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = {}
    for name, tensor in model.get_submodule("model.layers.0").state_dict().items():
        shape = tuple(tensor.shape)
        if len(shape) == 3:
            experts, inputs, out = shape
            block[f"{name}_blocks"] = numbers.cut(numbers.bytes, experts, out, inputs // 32, 16)
            block[f"{name}_scales"] = torch.full((experts, out, inputs // 32), 119, dtype=torch.uint8)
        elif len(shape) == 2 and not name.endswith("_bias"):
            block[name] = numbers.matrix(*shape)
        else:
            block[name] = torch.full(shape, float(name.endswith("layernorm.weight")), dtype=torch.bfloat16)
    return block


def in_fp8(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block whose matrices are in FP8, with scales for 128 x 128 weights."""
    packed = dict(block)
    for name, weight in block.items():
        if weight.ndim == 2 and "gate.weight" not in name:
            scale = float(weight.abs().max()) / 448
            packed[name] = (weight / scale).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = torch.full((weight.shape[0] // 128, weight.shape[1] // 128), scale)
    return packed


def write_model(folder: Path, parameters: float, hidden: int = 2048, experts: int = 0, stored: str = "bf16") -> int:
    """A random model of about that many parameters in shards of four blocks; how many it has."""
    shutil.rmtree(folder, ignore_errors=True)
    config, block = configured(parameters, hidden, experts, stored)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    numbers, weight_map = Numbers(), {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ends: dict[str, torch.Tensor] = {
        name: numbers.matrix(VOCABULARY, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save("model-ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    blocks = config.num_hidden_layers
    for start in range(0, blocks, 4):
        shard = {}
        for index in range(start, min(start + 4, blocks)):
            tensors = (gpt_oss_block if stored == "mxfp4" else llama_block)(config, numbers)
            tensors = in_fp8(tensors) if stored == "fp8" else tensors
            shard |= {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
        save(f"model-{start:05d}.safetensors", shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if stored != "bf16":
        words = {"quant_method": stored, "weight_block_size": [128, 128]}
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, "quantization_config": words}))
    return blocks * block + 2 * VOCABULARY * hidden + hidden


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
        dict(parameters=1.5e9, hidden=2048, experts=0, stored="bf16", method="wanda", samples=8, seq_len=256),
        dict(limit=float, out=Path("out/memory"), json=Path),
    )
    count = write_model(chosen.out / "model", chosen.parameters, chosen.hidden, chosen.experts, chosen.stored)
    os.environ["SECATEUR_CACHE"] = str(chosen.out / "unpacked")
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
    about = {"parameters": count, "stored": chosen.stored, "weight_bytes": weights, "method": chosen.method}
    about |= {
        "sparsity": sparsity,
        "tokens": chosen.samples * chosen.seq_len,
        "limit_bytes": chosen.limit,
        "group_peak_bytes": most,
    }
    about |= {"bare_bytes": bare, "peak_bytes": peak, "above_bare_gb": round((peak - bare) / 1e9, 3)}
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    print(json.dumps(write(chosen.json, command=command, **about, seconds=seconds)))
