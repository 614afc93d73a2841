#!/usr/bin/env bash
# torch 2.13.0, CPU: max_pool2d refuses uint8 and int8 images in channels_last from 12 x 12 pixels on, which it takes in any
# other layout, and in channels_last as int16. Its kernel keeps the index of the maximum in a signed byte.
# Seen: RuntimeError: Expected input_depth * input_height * input_width <= std::numeric_limits<integer_t>::max().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import itertools

import torch

LAYOUTS = (torch.contiguous_format, torch.channels_last)
for size, dtype, layout in itertools.product((11, 12), (torch.uint8, torch.int8, torch.int16), LAYOUTS):
    x = torch.randint(0, 100, (1, 3, size, size)).to(dtype).contiguous(memory_format=layout)
    try:
        pooled = torch.nn.functional.max_pool2d(x, 2)
        got = "right" if torch.equal(pooled.float(), torch.nn.functional.max_pool2d(x.float(), 2)) else "wrong"
    except RuntimeError as error:
        got = f"RuntimeError: {str(error).split(' to be true')[0]}"
    print(f"torch {torch.__version__}, {size} x {size}, {dtype}, {layout}: {got}")
    refused = size == 12 and dtype.itemsize == 1 and layout is torch.channels_last
    wanted = "RuntimeError: Expected input_depth * input_height * input_width <= std::numeric_limits<integer_t>::max()"
    assert got == (wanted if refused else "right")
PY
