#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 (which JAX uses): numbers beyond E4M3's largest, 448, become another value in each, and in
# torch the two FP8 dtypes follow opposite rules. Guess before the run: a cast saturates to 448 everywhere.
# Seen: from 465 on, infinity included, torch gives 448 in float8_e4m3fn, and ml_dtypes NaN; in float8_e5m2, whose largest is
# 57344, both give infinity from 61440 on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import ml_dtypes
import numpy
import torch


def through(values, torch_dtype, numpy_dtype):
    by_torch = torch.tensor(values).to(torch_dtype).float().tolist()
    return by_torch, numpy.array(values, numpy.float32).astype(numpy_dtype).astype(numpy.float32).tolist()


e4m3 = through([464.0, 465.0, 500.0, math.inf, -500.0], torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn)
e5m2 = through([61439.0, 61440.0, math.inf], torch.float8_e5m2, ml_dtypes.float8_e5m2)
print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}: E4M3 {e4m3}, E5M2 {e5m2}")
assert e4m3[0] == [448.0, 448.0, 448.0, 448.0, -448.0]
assert e4m3[1][0] == 448.0 and all(map(math.isnan, e4m3[1][1:]))
assert e5m2[0] == e5m2[1] == [57344.0, math.inf, math.inf]
PY
