#!/usr/bin/env bash
# torch 2.13.0, CPU: inside one autocast block a Linear goes on computing with its old weight after the weight was changed in
# place, as autocast keeps the 16-bit copy of a parameter until the block ends. Guess before the run: the copy is made again,
# since the tensor's version has changed.
# Seen: 1.0 before the change and 1.0 after the weight has been multiplied by 3; 3.0 in a new block, and with
# cache_enabled=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


def outputs(**options):
    layer, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    torch.nn.init.ones_(layer.weight)
    with torch.autocast("cpu", torch.bfloat16, **options):
        before = layer(x).item()
        with torch.no_grad():
            layer.weight.mul_(3)
        after = layer(x).item()
    with torch.autocast("cpu", torch.bfloat16, **options):
        return before, after, layer(x).item()


cached, not_cached = outputs(), outputs(cache_enabled=False)
print(f"torch {torch.__version__}: before, after, and in a new block: {cached}; without the cache: {not_cached}")
assert cached == (1.0, 1.0, 3.0) and not_cached == (1.0, 3.0, 3.0)
PY
