#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1 (torch 2.13.0), loading a Llama whose linear layers are stored as
# pack-quantized: four bits, a scale and a zero point for each 64 inputs, packed as compressed-tensors packs them.
# Guess before looking: it loads as the same model without zero points does, packed or, with dequantize=True, dense.
# Seen: with dequantize=True both load, (3 - 1) * 0.5 and 3 * 0.5 a weight. Packed, the one without zero points loads and
# the one with them is refused for mismatched sizes: room is made for zero points that are not packed.
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
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

SIZE = 64


def write(folder, *, symmetric):
    """A Llama of one block, every weight of its linear layers code 3 at scale 0.5."""
    shape = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, vocab_size=64)).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(".weight") for name in tensors if "_proj" in name]:
        del tensors[f"{name}.weight"]
        codes = torch.full((SIZE, SIZE), 3, dtype=torch.int8)
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{name}.weight_scale"] = torch.full((SIZE, 1), 0.5, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([SIZE, SIZE])
        if not symmetric:
            ones = torch.ones(SIZE, 1, dtype=torch.int8)
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(ones, 4, packed_dim=0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": SIZE}
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(said))


found = {}
for symmetric in (True, False):
    folder = Path(sys.argv[1]) / f"symmetric-{symmetric}"
    write(folder, symmetric=symmetric)
    for dense in (True, False):
        given = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **given)
            weight = getattr(model.model.layers[0].mlp.up_proj, "weight", None)
            seen = "loads" if weight is None else f"loads, weights {weight.float().unique().tolist()}"
        except RuntimeError as error:
            seen = "refused: " + ("mismatched sizes" if "mismatched_sizes" in str(error) else str(error))
        found[symmetric, dense] = seen
        print(f"symmetric {symmetric}, dequantize {dense}: {seen}")
as_seen = {
    (True, True): "loads, weights [1.5]", (True, False): "loads",
    (False, True): "loads, weights [1.0]", (False, False): "refused: mismatched sizes",
}
sys.exit(found != as_seen)
PY
"$work/env/bin/python" "$work/run.py" "$work/models" 2>/dev/null
