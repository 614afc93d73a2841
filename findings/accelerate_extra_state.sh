#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: load_checkpoint_and_dispatch with a device_map rejects a file with the extra state of a
# module (get_extra_state, part of every state_dict), although it loads that file without a device_map.
# Seen: ValueError: M(...) does not have a parameter or a buffer named _extra_state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy accelerate==1.15.0 safetensors
"$folder/venv/bin/python" -W ignore - <<'PY'
import tempfile
from pathlib import Path

import accelerate
import torch
from safetensors.torch import save_model


class M(torch.nn.Linear):
    def get_extra_state(self):
        return torch.zeros(4, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


model = torch.nn.Sequential(M(2, 2))
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "model.safetensors")
    save_model(model, path)
    accelerate.load_checkpoint_and_dispatch(model, path)
    try:
        accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})
    except ValueError as error:
        print(f"accelerate {accelerate.__version__}, torch {torch.__version__}: {error}")
        assert "does not have a parameter or a buffer named _extra_state" in str(error)
    else:
        raise SystemExit("it loads now")
PY
