#!/usr/bin/env bash
# torch 2.13.0: the square root of a CPU tensor is not correctly rounded. Guess before the run: it is, as IEEE 754 asks for
# that and processors have an instruction for it; NumPy's is.
# Seen: of 100,000 numbers in [0.01, 1.01] about one in five has a float32 root that is off by one ulp, and one in seventy a
# float64 root; the float32 root by way of float64 is right for all. `ATEN_CPU_CAPABILITY` changes nothing. The tensor's
# root comes from MKL's vector library, so another processor may have other counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/roots.py" <<'PY'
import numpy
import torch

torch.manual_seed(0)
x = torch.rand(100_000) + 0.01
right = torch.from_numpy(numpy.sqrt(x.numpy()))
wrong = int((x.sqrt() != right).sum())
ulps = int((x.sqrt().view(torch.int32) - right.view(torch.int32)).abs().max())
wrong64 = int((x.double().sqrt() != torch.from_numpy(numpy.sqrt(x.double().numpy()))).sum())
through64 = int((x.double().sqrt().float() != right).sum())
print(wrong > 10_000, ulps, wrong64 > 500, through64, sep="|")
print(f"torch {torch.__version__}: {wrong} float32 roots, {wrong64} float64 roots off by one ulp")
PY
found=$("$folder/venv/bin/python" "$folder/roots.py")
printf '%s\n' "$found"
[[ $(head -1 <<<"$found") == "True|1|True|0" ]]
