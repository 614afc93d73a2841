#!/usr/bin/env bash
# torch 2.13.0, CPU: dropout multiplies by its mask, so that an infinity or NaN that is dropped becomes NaN; with p = 1, where
# all is dropped, eager code gives NaN and compiled code 0. Guess before the run: what is dropped is 0, in either.
# Seen: NaN in eager code, 0 compiled, for p = 1; NaN for every dropped infinity in both for p = 1/2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import math

import torch
from torch.nn import functional


def drop_all(x):
    return functional.dropout(x, 1.0)


def drop_half(x):
    return functional.dropout(x, 0.5)


torch.manual_seed(0)
x = torch.full((1024,), math.inf)
eager, compiled = drop_all(x), torch.compile(drop_all)(x)
halves = [function(x) for function in (drop_half, torch.compile(drop_half))]
shares = [y.isnan().double().mean().item() for y in halves]
print(f"torch {torch.__version__}, p = 1: eager {eager[0].item()}, compiled {compiled[0].item()}; p = 1/2: {shares} are NaN")
assert eager.isnan().all() and (compiled == 0).all()
assert all(0.4 < share < 0.6 for share in shares) and all((y.isnan() | y.isinf()).all() for y in halves)
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py"
