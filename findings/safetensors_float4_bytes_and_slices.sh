#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a file has float4_e2m1fn_x2 as F4, with twice as many elements in the last dimension as
# the tensor has bytes, and float8_e8m0fnu as F8_E8M0. Guess before the run: every way of reading gives back what was
# saved.
# Seen: save_file and load_file do. load, from the bytes that save has made, knows neither name (KeyError); and a slice of
# float4, all of it or one row, is a RuntimeError, as the shape of 4-bit elements is applied to bytes. A slice of float8
# is right. So whether a checkpoint of MXFP4 or NVFP4 can be read depends on how it is read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
"$folder/venv/bin/python" -W ignore - "$folder/one.safetensors" <<'PY'
import json
import sys

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


print(f"safetensors {safetensors.__version__}, torch {torch.__version__}")
path = sys.argv[1]
for dtype, name, shape in (
    (torch.float4_e2m1fn_x2, "F4", [3, 8]),
    (torch.float8_e8m0fnu, "F8_E8M0", [3, 4]),
    (torch.float8_e4m3fn, "F8_E4M3", [3, 4]),
):
    tensor = torch.arange(12, dtype=torch.uint8).view(3, 4).view(dtype)
    saved = save({"a": tensor})
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])["a"]
    assert header == {"dtype": name, "shape": shape, "data_offsets": [0, 12]}, header
    save_file({"a": tensor}, path)
    assert same(load_file(path)["a"], tensor)
    with safe_open(path, "pt") as file:
        assert same(file.get_tensor("a"), tensor)
        row, whole = (raised(lambda: file.get_slice("a")[place]) for place in (slice(1, 2), slice(None)))
        if row is None:
            assert same(file.get_slice("a")[1:2], tensor[1:2])
    from_bytes = raised(lambda: load(saved))
    print(f"{name}: load: {from_bytes}; a slice: {row}; all of it: {whole}")
    assert from_bytes == (None if name == "F8_E4M3" else f"KeyError: '{name}'")
    for found in (row, whole):
        assert (found == "RuntimeError: shape '[3, 8]' is invalid for input of size 12") == (name == "F4")
        assert found is None or name == "F4"
PY
