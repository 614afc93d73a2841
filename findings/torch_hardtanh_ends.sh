#!/usr/bin/env bash
# torch 2.13.0: hardtanh and clamp are one function with two derivatives. Guess before the run: the same derivative
# everywhere, 1 at both ends.
# Seen: at the ends clamp has 1, hardtanh and relu6 0, and minimum(relu(x), 1) 0 at the lower and 1/2 at the upper one. At NaN
# clamp has 0, and the others 1. So a clipped activation whose inputs are quantized, and lie on its ends, trains differently
# by how it is spelled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import torch
from torch.nn import functional

SPELLINGS = {
    "clamp": lambda x: x.clamp(0, 1),
    "hardtanh": lambda x: functional.hardtanh(x, 0, 1),
    "relu6": lambda x: functional.relu6(6 * x) / 6,
    "minimum": lambda x: torch.minimum(torch.relu(x), torch.ones(())),
}
found = {}
for name, function in SPELLINGS.items():
    x = torch.tensor([0.0, 0.5, 1.0, math.nan], requires_grad=True)
    y = function(x)
    assert y[:3].tolist() == [0.0, 0.5, 1.0]
    found[name] = torch.autograd.grad(y.sum(), x)[0].tolist()
print(f"torch {torch.__version__}, derivatives at 0, 1/2, 1 and NaN: {found}")
assert found == {
    "clamp": [1.0, 1.0, 1.0, 0.0], "hardtanh": [0.0, 1.0, 0.0, 1.0], "relu6": [0.0, 1.0, 0.0, 1.0],
    "minimum": [0.0, 1.0, 0.5, 1.0],
}
PY
