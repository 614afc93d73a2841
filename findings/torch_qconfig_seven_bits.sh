#!/usr/bin/env bash
# torch 2.13.0: the default 8-bit quantization of activations for x86 has 7 bits: codes 0 to 127, so that the byte products of
# AVX2, pairs of which are added in 16 bits, do not saturate. Guess before the run: 0 to 255, as the dtype, quint8, and the
# other backends' defaults say.
# Seen: 0 to 127 for x86 and fbgemm, 0 to 255 for onednn and qnnpack, in post-training and in training; the step is twice as
# large.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.ao.quantization import get_default_qat_qconfig, get_default_qconfig

found = {}
for backend in ("x86", "fbgemm", "onednn", "qnnpack"):
    for get in (get_default_qconfig, get_default_qat_qconfig):
        observer = get(backend).activation()
        observer(torch.linspace(0, 1, 1001))
        step = observer.calculate_qparams()[0].item()
        found.setdefault(backend, set()).add((observer.quant_min, observer.quant_max, round(1 / step)))
        assert observer.dtype == torch.quint8
print(f"torch {torch.__version__}, (least code, largest code, steps from 0 to 1): {found}")
assert found["x86"] == found["fbgemm"] == {(0, 127, 127)}
assert found["onednn"] == found["qnnpack"] == {(0, 255, 255)}
PY
