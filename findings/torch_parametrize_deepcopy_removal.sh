#!/usr/bin/env bash
# torch 2.13.0: a deep copy of a parametrized module has the same class, from which remove_parametrizations deletes the
# property. Removed from the copy, the weight is gone from the original.
# Seen: AttributeError: 'ParametrizedLinear' object has no attribute 'weight'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from torch.nn.utils import parametrize

layer = torch.nn.Linear(2, 2)
parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
twin = copy.deepcopy(layer)
assert type(twin) is type(layer)
parametrize.remove_parametrizations(twin, "weight")
try:
    got = f"weight of shape {list(layer.weight.shape)}"
except AttributeError as error:
    got = f"AttributeError: {error}"
print(f"torch {torch.__version__}: {got}")
assert got == "AttributeError: 'ParametrizedLinear' object has no attribute 'weight'"
PY
