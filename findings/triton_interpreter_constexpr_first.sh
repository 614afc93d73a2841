#!/usr/bin/env bash
# triton 3.9.0: under the interpreter (TRITON_INTERPRET=1) a kernel cannot subtract a tensor from a constexpr that is a global
# of its module. Guess before the run: `C - x` runs as `-(x - C)` does, as both compile.
# Seen: `-(x - C)` runs; `C - x` raises "cannot convert ... to tensor"; compiled for sm_80 both are a subtraction.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat >"$folder/minus.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl

C = tl.constexpr(1.5)


@triton.jit
def minus(x, y, FIRST: tl.constexpr):
    if FIRST:
        tl.store(y, C - tl.load(x))
    else:
        tl.store(y, -(tl.load(x) - C))


for first in (False, True):
    if sys.argv[1] == "interpreted":
        x, y = torch.tensor([1.0]), torch.empty(1)
        try:
            minus[(1,)](x, y, first)
            print(y.item())
        except Exception as error:
            print("cannot convert" in str(error))
    else:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types = {"x": "*fp32", "y": "*fp32", "FIRST": "constexpr"}
        made = triton.compile(ASTSource(minus, types, {(2,): first}), target=GPUTarget("cuda", 80, 32))
        print(sum(word in ("sub.f32", "sub.rn.f32", "add.f32", "add.rn.f32") for word in made.asm["ptx"].split()))
PY
run() { TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/minus.py" "$1" | paste -sd'|'; }
interpreted=$(TRITON_INTERPRET=1 run interpreted)
compiled=$(run compiled)
printf 'interpreted  -(x - C)|C - x  %s\ncompiled     subtractions   %s\n' "$interpreted" "$compiled"
[[ $interpreted == "0.5|True" ]]
[[ $compiled == "1|1" ]]
