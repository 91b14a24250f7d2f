#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0) and mlx-lm 0.32.2 (mlx 0.32.4, CPU build) on one folder: shards model-0000?-of-00002
# with their index, and a newer model.safetensors beside them, as a second save_pretrained without sharding leaves it.
# Guess before looking: an index is there to say where tensors lie, so both read what it names, and nothing else.
# Seen: transformers reads model.safetensors and ignores the index without a word. mlx-lm ignores the index too, reads
# every file whose name begins with "model" in the order in which the directory lists them, and the last one wins: which
# model that is depends on the file system. So a folder copied elsewhere can be another model, with no file changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import glob
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

mx.set_default_device(mx.cpu)
NAME = "model.embed_tokens.weight"
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
whole = sys.argv[1]
by_transformers, by_mlx, last = {}, {}, {}
for order in ("shards first", "single first"):
    folder = Path(whole) / order.replace(" ", "-")
    old, new = folder / "old", folder / "new"
    for place, embedding, most in ((old, 1.0, "20kB"), (new, 2.0, "1GB")):
        model.get_parameter(NAME).data.fill_(embedding)
        model.save_pretrained(place, max_shard_size=most)
    both = folder / "both"
    both.mkdir()
    for place in ((old, new) if order == "shards first" else (new, old)):
        for file in sorted(place.iterdir()):
            (both / file.name).write_bytes(file.read_bytes())
    by_transformers[order] = AutoModelForCausalLM.from_pretrained(both).get_parameter(NAME)[0, 0].item()
    loaded, _ = load_model(both)
    by_mlx[order] = np.array(loaded.model.embed_tokens.weight)[0, 0].item()
    for file in glob.glob(str(both / "model*.safetensors")):
        with safe_open(file, "np") as tensors:
            if NAME in tensors.keys():
                last[order] = tensors.get_tensor(NAME)[0, 0].item()
print("1 is the indexed shards' embedding, 2 that of model.safetensors")
print("transformers", by_transformers)
print("mlx-lm      ", by_mlx, "; last in the directory's order", last)
sys.exit(not (set(by_transformers.values()) == {2.0} and by_mlx == last))
PY
"$work/env/bin/python" "$work/run.py" "$work" 2>/dev/null
