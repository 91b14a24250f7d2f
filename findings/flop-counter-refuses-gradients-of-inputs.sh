#!/usr/bin/env bash
# torch 2.13.0 (CPU build), torch.utils.flop_counter.FlopCounterMode.
# Guess before looking: a counter of operations only looks on: what runs without it runs under it, and both ways to ask for
# the gradient of an input, torch.autograd.grad and backward(), are counted alike.
# Seen: without the counter, and with backward() under it, the gradient of a tensor that a module is called with is
# computed, and the product for it is counted. torch.autograd.grad for the same tensor raises RuntimeError under
# the counter ("A leaf node was passed to _will_engine_execute_node …"): the counter notes where modules end on the way
# back by hooks on their inputs, and such hooks cannot be asked about a leaf. If the module gets x * 1.0, which is no leaf,
# it works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
x = torch.randn(3, 8, requires_grad=True)
(plain,) = torch.autograd.grad(model(x).sum(), x)
with FlopCounterMode(display=False) as counter:
    model(x).sum().backward()
print("backward under the counter:", torch.equal(plain, x.grad), counter.get_total_flops(), "operations")
with FlopCounterMode(display=False) as beside:
    (moved,) = torch.autograd.grad(model(x * 1.0).sum(), x)
print("autograd.grad through x * 1.0:", torch.equal(plain, moved), beside.get_total_flops(), "operations")
said = ""
try:
    with FlopCounterMode(display=False):
        torch.autograd.grad(model(x).sum(), x)
except RuntimeError as error:
    said = str(error)
print("autograd.grad for x itself:", said or "computed")
both = 2 * (2 * 3 * (8 * 8 + 8 * 4))
sys.exit(not ("_will_engine_execute_node" in said and counter.get_total_flops() == beside.get_total_flops() == both))
PY
"$work/env/bin/python" "$work/run.py"
