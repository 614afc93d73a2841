#!/usr/bin/env bash
# torch 2.13.0: a compiled module has no truth value. torch.compile(module) returns an OptimizedModule whose class has a
# __len__, for modules that have one; of a module without, bool() of the result raises a TypeError, and so do `compiled or
# default` and `if compiled:`, where the module itself is true as every object is. It is also an instance of
# collections.abc.Sized.
# Guess before: a compiled module is true if the module is.
# Seen: bool(Linear) is True; bool(torch.compile(Linear)) raises "Linear does not support len()"; of a Sequential both are
# True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PY'
from collections.abc import Sized

import torch
from torch import nn

linear, sequence = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
compiled = torch.compile(linear)
assert bool(linear) and bool(sequence) and bool(torch.compile(sequence))
assert not isinstance(linear, Sized) and isinstance(compiled, Sized)
try:
    print(bool(compiled))
except TypeError as error:
    print(f"torch {torch.__version__}: bool(Linear) is True, bool(torch.compile(Linear)) raises {error!r}")
    assert "does not support len()" in str(error)
else:
    raise SystemExit("a compiled Linear has a truth value")
PY
