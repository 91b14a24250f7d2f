"""What it costs to find which channels of a block belong together, at real widths.

    python bench/trace.py --hidden 4096 --ffn 11008 --json bench/results/trace.json

One random Llama block of that shape is traced, and beside it 1024 tokens go through the same block, so that the cost
can be said in calibration tokens whatever the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import torch
from common import options, write
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.models.channels.groups import removable_groups
from secateur.models.channels.trace import entering, trace
from secateur.models.load import replayable


@torch.no_grad()
def main() -> None:
    chosen = options(
        __doc__, dict(hidden=4096, ffn=11008, kv_heads=(int, "default: as many as query heads")), dict(json=Path)
    )
    heads = chosen.hidden // 128
    config = LlamaConfig(
        hidden_size=chosen.hidden, intermediate_size=chosen.ffn, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=chosen.kv_heads or heads, head_dim=128, vocab_size=256,
    )  # fmt: skip
    language_model = replayable(LlamaForCausalLM(config).eval())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block, hidden, call = entering(language_model, 0, torch.full((1, 1024), 5), device, torch.float32)
    block(hidden, *call.args, **call.kwargs)
    started = perf_counter()
    block(hidden, *call.args, **call.kwargs)
    forward = perf_counter() - started
    started = perf_counter()
    found = trace(language_model, 0, device=device, dtype=torch.float32)
    traced = perf_counter() - started
    started = perf_counter()
    units = {name: len(held) for name, held in removable_groups(found).items()}
    joined = perf_counter() - started
    line = {
        "shape": [chosen.hidden, chosen.ffn, heads, chosen.kv_heads or heads],
        "units": units,
        "seconds_trace": traced,
        "seconds_units": joined,
        "seconds_1024_tokens": forward,
        "tokens_it_costs": round(1024 * traced / forward),
    }
    print(json.dumps(line, indent=1))
    write(chosen.json, **line)


if __name__ == "__main__":
    main()
