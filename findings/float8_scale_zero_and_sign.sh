#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 (which JAX uses): float8_e8m0fnu, the powers of two that scale blocks in MX formats, has
# neither a zero nor a sign, and each library makes something else of them. Guess before the run: both give NaN.
# Seen: torch makes 2**-127 of zero and drops the sign of a negative number, so that a wrong scale is a plausible one;
# ml_dtypes gives NaN for both, so that the scale of a block of zeros, max|x| / 6, makes NaN of its zeros. All positive
# numbers that were tried, subnormals and ties included, are the same in both.
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


def through(values):
    values = numpy.array(values, numpy.float32)
    by_torch = torch.from_numpy(values).to(torch.float8_e8m0fnu).float().numpy()
    return by_torch, values.astype(ml_dtypes.float8_e8m0fnu).astype(numpy.float32)


by_torch, by_numpy = (found.tolist() for found in through([0.0, -0.0, -1.0, -3.0]))
print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}: of 0, -0, -1 and -3 {by_torch} and {by_numpy}")
assert by_torch == [2.0**-127, 2.0**-127, 1.0, 4.0]
assert all(map(math.isnan, by_numpy))

x = numpy.zeros(32, numpy.float32)
scale = numpy.array(abs(x).max() / 6).astype(ml_dtypes.float8_e8m0fnu).astype(numpy.float32)
assert numpy.isnan(x / scale).all()

positive = numpy.arange(1, 0x7F800000, 9973, dtype=numpy.uint32).view(numpy.float32)
assert numpy.array_equal(*through([*positive, 1.5, 3.0, 6.0, 2.0**-149, math.inf, math.nan]), equal_nan=True)
PY
