#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0: quantization-aware training of a model that has one Linear in two places.
# Guess: both places get the fake-quantized layer, as one module or two.
# Seen: quantize_ with QATConfig(step="prepare") replaces the first place alone, without a word. The second keeps the
# float layer, with the same weight: it trains as quantized in one place and as float in the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchao==0.18.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY' 2>&1 | grep -v "^W[0-9]"
import torch
import torchao
from torchao.quantization import Int4WeightOnlyConfig, quantize_
from torchao.quantization.qat import QATConfig

layer = torch.nn.Linear(64, 64)
model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))
got = [type(part).__name__ for part in model]
print(f"torchao {torchao.__version__}, torch {torch.__version__}: {got}, one weight: {model[0].weight is model[2].weight}")
assert got == ["FakeQuantizedLinear", "ReLU", "Linear"] and model[0].weight is model[2].weight
PY
