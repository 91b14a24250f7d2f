#!/usr/bin/env bash
# hqq 0.2.8.post1 (torch 2.13.0) on a CPU, four bits in groups of 64 with `round_zero`, which BaseQuantizeConfig sets for
# four bits by itself.
# Guess before looking: the zero points are whole numbers, so a weight of 0 is 0 after decoding.
# Seen: they are rounded first and optimised afterwards, and none is whole in the end; of the zeros of a matrix that was
# pruned to 2:4 none is left here. With optimize=False all are whole and all zeros stay.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --no-deps hqq==0.2.8.post1
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6 termcolor==3.3.0 tqdm einops accelerate==1.15.0 transformers==5.23.0
cat >"$work/run.py" <<'PY'
import sys

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer

assert BaseQuantizeConfig(nbits=4, group_size=64)["weight_quant_params"]["round_zero"]
torch.manual_seed(0)
weight = 0.02 * torch.randn(256, 512)
rank = weight.abs().unflatten(-1, (-1, 4)).argsort(-1).argsort(-1).flatten(-2)
weight = weight * (rank >= 2)  # 2:4
found = []
for optimize in (True, False):
    packed, meta = Quantizer.quantize(
        weight, nbits=4, group_size=64, round_zero=True, optimize=optimize, device="cpu", compute_dtype=torch.float32
    )
    dense, zero = Quantizer.dequantize(packed, meta).view(weight.shape), meta["zero"]
    whole = (zero == zero.round()).float().mean().item()
    kept = (dense[weight == 0] == 0).float().mean().item()
    print(f"optimize={optimize}: {whole:.1%} of the zero points are whole, {kept:.1%} of the zeros are left")
    found.append((whole, kept))
sys.exit(not (max(found[0]) < 0.5 and found[1] == (1.0, 1.0)))
PY
"$work/env/bin/python" -W ignore "$work/run.py"
