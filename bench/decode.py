r"""Whole models that exceed the cache: decoding a random Llama dense, with zeros packed, and with fewer channels.

    python bench/decode.py --json bench/results/decode.json
    python bench/decode.py --patterns "25% of channels,50% of channels" --runtimes eager,llamacpp,llamacpp-q8
    python bench/decode.py --patterns "25% of channels,50% of channels" --runtimes eager,onnxruntime --dtype float32

    python bench/decode.py --hidden 4096 --ffn 11008 --blocks 3 --patterns 50%,70% --values int4 \
        --runtimes eager,packed-int4,llamacpp-q4 --json bench/results/decode-int4.json

With `--values` all matrices lie on such a grid, so that runtimes that round to it need not: a grid of groups of 128 is
one of groups of 32 too. The weights are random, so only speed is measured, and outputs are compared between runtimes.
Zeros are put by magnitude; channels go at random.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import options
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.cli.tables import speed_table
from secateur.data.windows import Windows
from secateur.deployment.packing import packed_values
from secateur.methods.values import nearest_codes
from secateur.models.load import load
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.system.devices import find_resources
from secateur.system.progress import show
from secateur.system.settings import Compute, Destination, Recipe, Trust

if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(hidden=2048, ffn=5504, blocks=8, patterns="50%,60%,70%,2:4"),
        dict(runtimes="eager,packed,packed-int8", batch="1", dtype="bfloat16", values="as stored"),
        dict(new=16, rounds=8, prompt=64, out=Path("out/decode"), json=Path),
    )
    dense = chosen.out / "dense"
    if not dense.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=chosen.hidden, intermediate_size=chosen.ffn, num_hidden_layers=chosen.blocks,
            num_attention_heads=chosen.hidden // 128, num_key_value_heads=chosen.hidden // 256, head_dim=128,
            vocab_size=8192, max_position_embeddings=2048,
        )  # fmt: skip
        model = LlamaForCausalLM(config).bfloat16()
        if (values := packed_values(chosen.values)) is not None:
            for name, weight in model.named_parameters():
                if name.endswith("proj.weight"):
                    for rows in weight.data.split(1024):
                        rows.copy_(nearest_codes(rows, values).dense(torch.bfloat16))
        model.save_pretrained(dense)
    ids = torch.randint(3, 8000, (2, 32), generator=torch.Generator().manual_seed(0))
    folders = []
    for pattern in chosen.patterns.split(","):
        folders.append(chosen.out / pattern.replace("%", "pct").replace(" ", "-").replace(":", "of"))
        if not folders[-1].exists():
            prune_checkpoint(
                Opened(open_checkpoint(dense), load(dense), Windows(ids, "random", "none", 0, None)),
                find_recipe(Recipe(method="random" if "channels" in pattern else "magnitude", pattern=pattern)),
                find_resources(Compute()),
                Destination(out=folders[-1]),
                Trust(),
            )
    results = secateur.bench(
        folders, dense=dense, runtimes=chosen.runtimes.split(","), prompt=(chosen.prompt,), new=chosen.new,
        batch=[int(size) for size in chosen.batch.split(",")], rounds=chosen.rounds, dtype=chosen.dtype,
        out=chosen.json, progress=show(quiet=False),
    )  # fmt: skip
    Console(width=200).print(speed_table(results))
    for what, reason in results.skipped.items():
        print(f"not timed: {what}: {reason}")
