#!/usr/bin/env bash
# torch 2.13.0: a compiled function that reads an attribute of a threading.local whose default stands in the class keeps the
# default after the thread has set the attribute: no recompilation, and the result of the old branch. With the default set in
# __init__, or with an ordinary object, it is compiled again. Guess before the run: a guard on the value, as for other objects.
# Seen: 30.0 where eager code gives 4.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat >"$folder/local.py" <<'PY'
import threading

import torch


class InClass(threading.local):
    depth = 0


class InInit(threading.local):
    def __init__(self):
        self.depth = 0


class Ordinary:
    depth = 0


def branch(state):
    def run(x):
        return x + 1 if state.depth > 0 else x * 10

    return run


def after_setting(state):
    torch._dynamo.reset()
    eager = branch(state)
    compiled, x = torch.compile(eager, backend="eager"), torch.tensor([3.0])
    assert compiled(x).item() == 30.0
    state.depth = 1
    return compiled(x).item(), eager(x).item()


found = {kind.__name__: after_setting(kind()) for kind in (InClass, InInit, Ordinary)}
print(f"torch {torch.__version__}, (compiled, eager) after the thread set depth to 1: {found}")
assert found == {"InClass": (30.0, 4.0), "InInit": (4.0, 4.0), "Ordinary": (4.0, 4.0)}, found
PY
"$folder/venv/bin/python" -W ignore "$folder/local.py"
