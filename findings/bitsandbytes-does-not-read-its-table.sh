#!/usr/bin/env bash
# bitsandbytes 0.50.2 (torch 2.13.0) on a CPU, decoding 4-bit weights whose checkpoint keeps the sixteen numbers that its
# codes stand for (`quant_map`, one for every weight), as transformers saves them.
# Guess before looking: the numbers are stored so that they are used; half of each in the file gives half of each weight.
# Seen: QuantState.from_dict takes them over into `code`, and dequantize_4bit gives the same weights to the bit: the table
# in the library counts, for NF4 and FP4. In eight bits dequantize_blockwise does use the table that it is given.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import sys

import torch
from bitsandbytes.functional import (
    QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise,
)

cpu = torch.device("cpu")
torch.manual_seed(0)
weight = torch.randn(64, 128)
changed = False
for kind in ("nf4", "fp4"):
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
    stored = state.as_dict(packed=True)
    read = QuantState.from_dict(dict(stored), device=cpu)
    halved = QuantState.from_dict({**stored, "quant_map": stored["quant_map"] / 2}, device=cpu)
    taken_over = torch.equal(halved.code, read.code / 2)
    same = torch.equal(dequantize_4bit(packed, halved), dequantize_4bit(packed, read))
    print(f"{kind}: table of the file taken over: {taken_over}; weights as without it: {same}")
    changed |= not (taken_over and same)
packed, state = quantize_blockwise(weight, blocksize=64)
full = dequantize_blockwise(packed, state)
state.code = state.code / 2
half = dequantize_blockwise(packed, state)
print(f"eight bits: half the table gives half the weights: {torch.allclose(half, full / 2)}")
changed |= not torch.allclose(half, full / 2)
sys.exit(changed)
PY
"$work/env/bin/python" "$work/run.py" 2>/dev/null
