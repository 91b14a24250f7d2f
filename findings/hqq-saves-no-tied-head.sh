#!/usr/bin/env bash
# hqq 0.2.8.post1 with transformers 5.23.0 and safetensors 0.8.0 on a CPU: a Llama whose head is its embedding, as in most
# small models, quantised by AutoHQQHFModel.quantize_model and written by its save_to_safetensors.
# Guess before looking: linear layers are packed, the head is left out as in transformers, and the folder is written.
# Seen: RuntimeError of safetensors, that lm_head.weight and model.embed_tokens.weight share memory; config.json is there,
# weights are not. The same model with its own head is written.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --no-deps hqq==0.2.8.post1
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 termcolor==3.3.0 tqdm einops accelerate==1.15.0 \
    transformers==5.23.0 safetensors==0.8.0
cat >"$work/run.py" <<'PY'
import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
said = {}
for tied in (True, False):
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).bfloat16()
    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=settings, compute_dtype=torch.bfloat16, device="cpu")
    folder = Path(sys.argv[1]) / str(tied)
    try:
        AutoHQQHFModel.save_to_safetensors(model, str(folder))
        said[tied] = "written"
    except RuntimeError as error:
        said[tied] = next(line.strip() for line in str(error).splitlines() if "share memory" in line)
    print(f"tied={tied}: {said[tied][:60]}; files: {sorted(file.name for file in folder.iterdir())}")
sys.exit(not ("share memory" in said[True] and said[False] == "written"))
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work" 2>/dev/null
