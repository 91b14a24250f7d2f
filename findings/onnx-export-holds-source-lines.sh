#!/usr/bin/env bash
# torch 2.13.0, torch.onnx.export (the exporter based on torch.export, the default since 2.9).
# Guess before looking: an .onnx file holds the graph and the weights, and the name of its producer.
# Seen: every node carries metadata with the absolute path of the source file on the machine that exported it, the
# line number and the text of the source line, comments included; ONNXProgram.save has no switch to leave it out. So two exports of one
# model from two folders differ in their bytes, and a published file tells where and from which code it was made.
# (A small Llama of ours: 683 KB of graph, most of it such metadata.) What helps: delete `metadata_props` of the nodes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
cat >"$work/own_model.py" <<'PY'
import torch


class Doubler(torch.nn.Module):
    def forward(self, x):
        return x * 2 + 1  # a remark of the author
PY
cat >"$work/run.py" <<'PY'
import pathlib
import sys

import onnx
import torch
from own_model import Doubler

file = pathlib.Path(sys.path[0], "model.onnx")
torch.onnx.export(Doubler().eval(), (torch.randn(2, 3),), dynamo=True, verbose=False).save(str(file))
data = file.read_bytes()
path, remark = str(file.with_name("own_model.py")).encode() in data, b"a remark of the author" in data
print(f"torch {torch.__version__}: the file holds the source's path: {path}, its line with the remark: {remark}")
model = onnx.load(file)
for node in model.graph.node:
    del node.metadata_props[:]
onnx.checker.check_model(model)
bare = model.SerializeToString()
print(f"{len(data)} bytes, {len(bare)} without the nodes' metadata")
sys.exit(not (path and remark and b"a remark of the author" not in bare))
PY
cd "$work" && ./env/bin/python run.py 2>/dev/null
