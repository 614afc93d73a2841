#!/usr/bin/env bash
# torch 2.13.0: an observer that has seen one NaN has a NaN step from then on, however many good batches follow, without an
# error or a warning; the histogram observer raises an error. Guess before the run: NaN is ignored, or it is an error, in all
# of them; at the least a later batch mends the moving average.
# Seen: scale NaN and zero point 0 after three more batches, from MinMaxObserver, MovingAverageMinMaxObserver and
# PerChannelMinMaxObserver.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import torch
from torch.ao import quantization

found = {}
for kind in ("MinMaxObserver", "MovingAverageMinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver"):
    observer = getattr(quantization, kind)()
    try:
        for batch in ([[0.0, 1.0]], [[0.0, math.nan]], *[[[0.0, 2.0]]] * 3):
            observer(torch.tensor(batch))
        scale, zero = observer.calculate_qparams()
        found[kind] = f"scale {scale.item()}, zero point {zero.item()}"
    except RuntimeError as error:
        found[kind] = f"RuntimeError: {error}"
print(f"torch {torch.__version__}: {found}")
*silent, told = found.values()
assert silent == ["scale nan, zero point 0"] * 3
assert told == "RuntimeError: torch.histc: range of [nan, nan] is not finite"
PY
