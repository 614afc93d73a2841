#!/usr/bin/env bash
# torch 2.13.0: copy_ into a jagged nested tensor that is part of a graph works forward, as into a dense one, and has no
# backward. Out of place (y = torch.sin(y)) it has one.
# Seen: NotImplementedError: aten._nested_tensor_size.default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


def gradient(in_place):
    torch.manual_seed(0)
    parts = [torch.randn(2, 8), torch.randn(5, 8)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = x * 2
    y = y.copy_(torch.sin(y)) if in_place else torch.sin(y)
    y.to_padded_tensor(0.0).sum().backward()
    return x.grad


print(f"torch {torch.__version__}, out of place: a gradient of {gradient(False).values().shape}")
try:
    gradient(True)
except NotImplementedError as error:
    print("in place:", error)
    assert "aten._nested_tensor_size.default" in str(error)
else:
    raise SystemExit("it has a backward now")
PY
