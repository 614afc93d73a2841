#!/usr/bin/env bash
# torch 2.13.0, CPU: fake quantization turns a NaN into its lowest level, and the quantization that it stands for turns it
# into the highest. Guess before the run: NaN stays NaN in the fake one, so that a diverged network shows it, and becomes the
# zero point in the real one.
# Seen: with 4 unsigned bits and zero point 3, NaN becomes -0.75, which is code 0; quantize_per_tensor makes it code 255 of
# quint8 and 127 of qint8, as it does infinity. The gradient of the NaN is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import torch

x = torch.tensor([math.nan, 1.0, math.inf], requires_grad=True)
fake = torch.fake_quantize_per_tensor_affine(x, 0.25, 3, 0, 15)
(gradient,) = torch.autograd.grad(fake.sum(), x)
real = {
    str(dtype): torch.quantize_per_tensor(x.detach(), 0.25, 3, dtype).int_repr().tolist()
    for dtype in (torch.quint8, torch.qint8)
}
print(f"torch {torch.__version__}: NaN, 1 and infinity become {fake.tolist()}, gradients {gradient.tolist()}; codes {real}")
assert fake.tolist() == [-0.75, 1.0, 3.0] and gradient.tolist() == [0.0, 1.0, 0.0]
assert real == {"torch.quint8": [255, 7, 255], "torch.qint8": [127, 7, 127]}
PY
