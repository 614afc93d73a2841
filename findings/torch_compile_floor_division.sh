#!/usr/bin/env bash
# torch 2.13.0, CPU: floor division of floats (//, floor_divide, div with rounding_mode="floor") is the floor of the exact
# quotient in eager code, as in Python, to which div's documentation refers, and the floor of the rounded quotient once it
# is compiled. Guess before the run: the same result from both.
# Seen: 0.5 // 0.1 is 4.0 in eager code, 5.0 compiled. Of the 256 codes of 8 bits, times a step of 0.1, eager code takes 120
# one too low, compiled code 18; with a step of 1/255, 120 and none. With 1/16 both are right. floor(x / step) is one
# function, the compiled one's. A quantizer that rounds down by // has other codes after torch.compile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PY'
import torch

WAYS = {
    "//": lambda x, step: x // step,
    "floor_divide": torch.floor_divide,
    "div": lambda x, step: torch.div(x, step, rounding_mode="floor"),
    "floor of /": lambda x, step: torch.floor(x / step),
}
codes = torch.arange(-128, 128)
for name, way in WAYS.items():
    compiled = torch.compile(way, dynamic=False)
    for number, eager_low, compiled_low in ((0.1, 120, 18), (1 / 255, 120, 0), (1 / 16, 0, 0)):
        step = torch.tensor(number)
        x = codes * step
        found = [f(x, step) for f in (way, compiled)]
        low = [(y != codes).sum().item() for y in found]
        print(f"torch {torch.__version__}, {name}, step {number:.4g}: eager {low[0]}, compiled {low[1]} of 256 too low")
        assert low == [compiled_low if name == "floor of /" else eager_low, compiled_low]
        assert all(((codes - y) * (y != codes)).sum() == n for y, n in zip(found, low))
        if name != "floor of /":
            exact = torch.floor(x.double() / step.double())  # Right: no such quotient is that close to an integer.
            assert torch.equal(found[0].double(), exact)

half, tenth = torch.tensor([0.5]), torch.tensor(0.1)
eager, compiled = (half // tenth).item(), torch.compile(WAYS["//"])(half, tenth).item()
print(f"0.5 // 0.1: eager {eager}, compiled {compiled}, Python {0.5 // 0.1}")
assert (eager, compiled, 0.5 // 0.1) == (4.0, 5.0, 4.0)
PY
