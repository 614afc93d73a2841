#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.rand, whose numbers are in [0, 1), returns 1 in bfloat16 and float16 once it is compiled. Inductor
# draws float32 numbers and rounds them. Guess before the run: never 1, compiled or not.
# Seen: in 2**20 bfloat16 numbers one in 500 or so is 1 if compiled, none in eager code, where the largest is 0.99609375 and
# the mean 0.498: eager code rounds down. Noise of either kind makes floor(x + noise) a biased rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch

torch.manual_seed(0)


def draw(dtype):
    return torch.rand(2**20, dtype=dtype)


compiled = torch.compile(draw)
for dtype, largest in ((torch.bfloat16, 0.99609375), (torch.float16, 0.99951171875)):
    eager, other = draw(dtype), compiled(dtype)
    ones = int((other == 1).sum())
    print(
        f"torch {torch.__version__}, {dtype}: eager at most {eager.max().item()}, mean {eager.double().mean():.5f};"
        f" compiled at most {other.max().item()}, {ones} ones, mean {other.double().mean():.5f}"
    )
    assert eager.max().item() == largest and other.max().item() == 1 and ones > 50
    if dtype == torch.bfloat16:
        assert eager.double().mean() < 0.499 < other.double().mean()
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py"
