#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: binary operators on arrays of 4-bit and 2-bit integers stay in the dtype and wrap around;
# the unary ones leave it, without a word, for int8. Guess before the run: -x is 0 - x.
# Seen: of an int4 -8, -x and abs(x) are the int8 8, above the largest int4, while 0 - x and x * -1 are the int4 -8; of a
# uint4 1, -x is the int8 -1 and ~x the int8 -2, where 0 - x is the uint4 15. The type of a formula, its bytes when saved
# and the codes it stands for hang on how it is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy


def said(value):
    return value.dtype.name, int(value[0])


for dtype, least in ((ml_dtypes.int4, -8), (ml_dtypes.int2, -2)):
    x, name = numpy.array([least], dtype), numpy.dtype(dtype).name
    unary = [said(-x), said(abs(x))]
    binary = [said(numpy.zeros(1, dtype) - x), said(x * numpy.array([-1], dtype))]
    print(f"ml_dtypes {ml_dtypes.__version__}, {name} {least}: -x, abs(x) {unary}; 0 - x, x * -1 {binary}")
    assert unary == [("int8", -least)] * 2 and binary == [(name, least)] * 2

one = numpy.array([1], ml_dtypes.uint4)
found = [said(-one), said(~one), said(numpy.zeros(1, ml_dtypes.uint4) - one)]
print(f"uint4 1: -x, ~x, 0 - x {found}")
assert found == [("int8", -1), ("int8", -2), ("uint4", 15)]
PY
