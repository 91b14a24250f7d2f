#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1 (torch 2.13.0), loading a Mixtral whose linear layers are stored as
# nvfp4-pack-quantized: codes of four bits, a scale for each 16 inputs, and a global scale by which these are divided.
# Guess before looking: every weight comes as code * scale / global scale, in attention and in experts.
# Seen: attention does; experts come as code * scale, 448 times too large here. Neither missing nor unexpected keys are
# reported, and nothing is said.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.1 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, MixtralConfig, MixtralForCausalLM

folder, size = Path(sys.argv[1]), 32
shape = {"hidden_size": size, "intermediate_size": size, "num_attention_heads": 2, "num_key_value_heads": 2}
config = MixtralConfig(**shape, head_dim=16, num_hidden_layers=1, num_local_experts=2, vocab_size=64)
MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)  # for its configuration; weights follow

layer = "model.layers.0."
linear = [f"{layer}self_attn.{part}_proj" for part in "qkvo"]
linear += [f"{layer}block_sparse_moe.experts.{expert}.w{part}" for expert in range(2) for part in (1, 2, 3)]
dense = {
    "model.embed_tokens": (64, size), "lm_head": (64, size), "model.norm": (size,),
    f"{layer}input_layernorm": (size,), f"{layer}post_attention_layernorm": (size,),
    f"{layer}block_sparse_moe.gate": (2, size),
}
tensors = {f"{name}.weight": torch.ones(dims, dtype=torch.bfloat16) for name, dims in dense.items()}
for name in linear:  # code 2 is 1.0; so every weight is 1.0 * 448 / 448
    tensors[f"{name}.weight_packed"] = torch.full((size, size // 2), 0x22, dtype=torch.uint8)
    tensors[f"{name}.weight_scale"] = torch.full((size, size // 16), 448.0).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_global_scale"] = torch.tensor([448.0])
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
said = json.loads((folder / "config.json").read_text())
said["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*gate$"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
}
(folder / "config.json").write_text(json.dumps(said))

plain = CompressedTensorsConfig(dequantize=True)
model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, quantization_config=plain)
found = {
    name: sorted(set(weight.float().flatten().tolist()))
    for name, weight in model.state_dict().items() if "_proj" in name
}
for name, values in found.items():
    print(name, values)
print("missing:", list(told["missing_keys"]), "unexpected:", list(told["unexpected_keys"]))
as_seen = all(values == ([448.0] if "experts" in name else [1.0]) for name, values in found.items())
sys.exit(not as_seen or bool(told["missing_keys"]) or bool(told["unexpected_keys"]))
PY
"$work/env/bin/python" "$work/run.py" "$work/model" 2>/dev/null
