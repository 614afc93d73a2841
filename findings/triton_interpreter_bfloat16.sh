#!/usr/bin/env bash
# triton 3.9.0: its interpreter (TRITON_INTERPRET=1) converts float32 to bfloat16 by truncation, where the code compiled for
# a GPU rounds to nearest even, and converts subnormals between the two to other numbers. Guess before the run: the
# interpreter rounds as the compiled code does, or refuses the dtype.
# Seen: 1.00415 becomes 1.0 instead of 1.0078125; 3.4e38 stays finite instead of infinity; 3e-40 becomes 7.4e-39; the
# bfloat16 2**-127 becomes 0 in float32. torch and the PTX for sm_80 (cvt.rn) do neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 triton==3.9.0 numpy
cat >"$folder/cast.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, DTYPE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(DTYPE))


if sys.argv[1] == "interpreted":
    x = torch.tensor([1.00415, 3.4e38, 3e-40, 1.0])
    narrow = torch.empty(4, dtype=torch.bfloat16)
    cast[(1,)](x, narrow, tl.bfloat16, 4)
    small = torch.tensor([2.0**-127, 3 * 2.0**-130, 2.0**-126, 1.0]).bfloat16()
    wide = torch.empty(4)
    cast[(1,)](small, wide, tl.float32, 4)
    print(*narrow.tolist(), *wide.tolist(), sep="|")
    print(*x.bfloat16().tolist(), *small.float().tolist(), sep="|")
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x": "*fp32", "y": "*bf16", "DTYPE": "constexpr", "N": "constexpr"}
    made = triton.compile(ASTSource(cast, types, {(2,): tl.bfloat16, (3,): 256}), target=GPUTarget("cuda", 80, 32))
    print(*{word for word in made.asm["ptx"].split() if word.startswith("cvt") and "bf16" in word})
PY
run() { TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/cast.py" "$1"; }
found=$(TRITON_INTERPRET=1 run interpreted)
compiled=$(run compiled)
interpreted=$(head -1 <<<"$found")
by_torch=$(tail -1 <<<"$found")
printf 'triton 3.9.0 interpreted  %s\ntorch 2.13.0              %s\ncompiled for sm_80        %s\n' "$interpreted" "$by_torch" "$compiled"
[[ $interpreted == "1.0|3.3895313892515355e+38|7.438675188797288e-39|1.0|0.0|5.877471754111438e-39|1.1754943508222875e-38|1.0" ]]
[[ $by_torch == "1.0078125|inf|2.7550648847397363e-40|1.0|5.877471754111438e-39|2.204051907791789e-39|1.1754943508222875e-38|1.0" ]]
[[ $compiled == cvt.rn.* ]]
