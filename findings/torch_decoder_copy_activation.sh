#!/usr/bin/env bash
# torch 2.13.0: a deep copy of an nn.TransformerDecoderLayer whose activation is a module silently uses F.relu instead, and so
# does nn.TransformerDecoder, which copies its layer. __setstate__ looks for "activation" among the plain attributes, which do
# not contain modules. nn.TransformerEncoderLayer keeps its activation.
# Seen: the decoder layer's copy has <function relu>; its output differs, the encoder layer's does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(1, 3, 8)
for kind, arguments, same in ((nn.TransformerEncoderLayer, (x,), True), (nn.TransformerDecoderLayer, (x, x), False)):
    layer = kind(8, 2, 16, batch_first=True, activation=nn.Tanh()).eval()
    twin = copy.deepcopy(layer)
    equal = torch.equal(layer(*arguments), twin(*arguments))
    print(f"torch {torch.__version__} {kind.__name__}: the copy has {twin.activation}, equal output: {equal}")
    assert equal is same
    assert (twin.activation is nn.functional.relu) is not same
layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, activation=nn.Tanh())
stack = nn.TransformerDecoder(layer, 2)
print("in an nn.TransformerDecoder:", stack.layers[0].activation)
assert stack.layers[0].activation is nn.functional.relu
PY
