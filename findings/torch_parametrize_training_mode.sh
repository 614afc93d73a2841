#!/usr/bin/env bash
# torch 2.13.0: register_parametrization on a module in evaluation mode leaves the containers that it adds in training mode.
# Seen: parametrizations and parametrizations.weight are in training mode.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.nn.utils import parametrize

layer = torch.nn.Linear(2, 2).eval()
parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
training = [name for name, module in layer.named_modules() if module.training]
print(f"torch {torch.__version__}: {' and '.join(training)} are in training mode")
assert training == ["parametrizations", "parametrizations.weight"]
PY
