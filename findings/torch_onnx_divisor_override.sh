#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export(dynamo=True) drops the divisor_override of avg_pool2d without a word. ONNX's
# AveragePool has no such attribute.
# Guess before it was run: the export refuses it, or multiplies the average.
# Seen: the sum of four ones, with divisor_override=1, is 4 in torch and 1 in onnxruntime 1.32.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import onnxruntime as ort
import torch
import torch.nn.functional as F


class Sum(torch.nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2, divisor_override=1)


x = torch.ones(1, 1, 2, 2)
program = torch.onnx.export(Sum().eval(), (x,), dynamo=True, verbose=False)
session = ort.InferenceSession(program.model_proto.SerializeToString())
(y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
print(f"torch {torch.__version__}: {Sum()(x).item()}; exported, in onnxruntime {ort.__version__}: {y.item()}")
if y.item() != 1:
    raise SystemExit("it is otherwise now")
PY
