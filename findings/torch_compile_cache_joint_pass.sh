#!/usr/bin/env bash
# torch 2.13.0: torch._functorch.config.joint_custom_pass, a pass over the graph of forward and backward, is no part of the key
# of AOTAutograd's cache on disk. A process that sets a pass gets the graph that another process compiled without it: the pass
# is not called, and nothing is said. Guess before the run: the key has the pass, or the cache is bypassed, as it is for
# Inductor's own custom passes without a uuid().
# Seen: the pass runs once in a fresh cache, and never in one that a process without the pass has filled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat >"$folder/compile.py" <<'PY'
import sys

import torch
import torch._functorch.config

calls = 0


def counting(graph_module, inputs):
    global calls
    calls += 1
    return graph_module


if sys.argv[1] == "with":
    torch._functorch.config.joint_custom_pass = counting
x = torch.randn(8, 8, requires_grad=True)
torch.compile(lambda x: (x.sin() * 3).cos())(x).sum().backward()
print(calls)
PY
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" -W ignore "$folder/compile.py" "$2"; }
fresh=$(run one with)
run two without >/dev/null
after=$(run two with)
echo "torch 2.13.0, calls of the pass: $fresh with a fresh cache, $after with one filled without the pass"
[[ $fresh == 1 && $after == 0 ]]
