r"""The peak memory of packing a random bf16 Llama with half of its weights gone, beside what comes out.

    python bench/pack_memory.py --json bench/results/pack-memory.json

Two ways: `secateur export --to packed`, and the runtimes `packed`, `packed-int8` and `packed-int4` of `bench`, which
pack while they load. Each runs in a process of its own that has packed a tiny model before, so that what is imported
does not count. `resident` includes the mapped pages of the files that are read, `anonymous` does not. Weights lie on
the grid of int4 with groups of 128.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import options, write
from memory import run
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from secateur.data.demo import model_folder

PACK = """
import sys
from pathlib import Path
import torch, secateur
from secateur.deployment.runtimes import RUNTIMES
from secateur.system.memory import PeakMemory, anonymous_bytes, resident_bytes

def pack(source, way, values, out):
    if way == "export":
        secateur.export(source, out=out, to="packed", values=values)
        return sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    running = RUNTIMES["packed" if values == "as stored" else f"packed-{values}"].load(Path(source), torch.bfloat16)
    embedding = running.model.get_input_embeddings().weight
    return running.weight_bytes + embedding.nbytes

tiny, source, out, way, values = sys.argv[1:]
pack(tiny, way, values, out + "-tiny")
with PeakMemory(resident_bytes) as resident, PeakMemory(anonymous_bytes) as anonymous:
    before = resident.bytes, anonymous.bytes
    size = pack(source, way, values, out)
print(size, resident.bytes - before[0], anonymous.bytes - before[1])
"""


def write_model(folder: Path, hidden: int, ffn: int, blocks: int, shard_blocks: int = 1000) -> None:
    """A random Llama in bf16, in a shard for so many blocks, half of its matrices zero and the rest on a grid."""
    shutil.rmtree(folder, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks, num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128, vocab_size=8192, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        levels = torch.randint(1, 8, (rows, columns), generator=draw, dtype=torch.int8)
        signs = torch.randint(0, 4, (rows, columns), generator=draw, dtype=torch.int8) - 2  # half of them 0
        signs[signs == -2] = 0
        signs[:, ::128], levels[:, ::128] = 1, 7
        return (levels * signs).bfloat16() * 2.0**-7

    shapes = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    shapes |= {f"mlp.{n}_proj": (ffn, hidden) for n in ("gate", "up")} | {"mlp.down_proj": (hidden, ffn)}
    tensors = {name: torch.randn(8192, hidden, generator=draw).bfloat16() * 0.02 for name in ("embed", "head")}
    tensors = {"model.embed_tokens.weight": tensors["embed"], "lm_head.weight": tensors["head"]}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for block in range(blocks):
        name = f"model.layers.{block}."
        tensors |= {f"{name}{part}.weight": matrix(*shape) for part, shape in shapes.items()}
        for part in ("input", "post_attention"):
            tensors[f"{name}{part}_layernorm.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(hidden=4096, ffn=11008, blocks=3, values="as stored,int8,int4", ways="export,load"),
        dict(out=Path("out/pack-memory"), json=Path),
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_model(chosen.out / "tiny", 256, 512, 1)
    write_model(chosen.out / "model", chosen.hidden, chosen.ffn, chosen.blocks)
    lines = []
    for way in chosen.ways.split(","):
        for values in chosen.values.split(","):
            places = [str(chosen.out / name) for name in ("tiny", "model", f"{way}-{values.replace(' ', '-')}")]
            size, resident, anonymous = run(PACK, *places, way, values)
            lines.append(
                {"way": way, "values": values, "bytes": size, "resident_bytes": resident, "anonymous_bytes": anonymous}
                | {"resident_over_result": resident / size}
            )
            print(json.dumps(lines[-1]), flush=True)
    shutil.rmtree(chosen.out)
    write(chosen.json, lines=lines)
