#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode around torch.inference_mode counts a module whose input does not require grad, but raises an
# error if the input does; under no_grad it counts both.
# Seen: AttributeError: 'NoneType' object has no attribute 'next_functions'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode

model = torch.nn.Linear(2, 2)
for mode in (torch.no_grad, torch.inference_mode):
    for requires_grad in (False, True):
        x = torch.randn(2, 2, requires_grad=requires_grad)
        try:
            with FlopCounterMode(display=False) as counter, mode():
                model(x)
            got = f"{counter.get_total_flops()} flops"
        except AttributeError as error:
            got = f"AttributeError: {error}"
        print(f"torch {torch.__version__}, {mode.__name__}, requires_grad={requires_grad}: {got}")
        raises = mode is torch.inference_mode and requires_grad
        wanted = "AttributeError: 'NoneType' object has no attribute 'next_functions'" if raises else "16 flops"
        assert got == wanted
PY
