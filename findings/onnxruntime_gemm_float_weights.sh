#!/usr/bin/env bash
# onnxruntime 1.32.0 (onnx 1.23.2, CPU): a Gemm with constant float weights, between a DequantizeLinear and a QuantizeLinear, gets
# weights of 8 bits from the level "basic" on, which is below the default: it becomes a QGemm with one scale for the whole matrix.
# Nothing in the graph quantizes the weights. A column of small weights becomes 0, and the model's output with it.
# Guess before it was run: a Gemm whose weights do not come from a DequantizeLinear stays in floats.
# Seen: [255, 120] without optimization, which is right, and [255, 0] with "basic" and with all of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

weight = np.ones((4, 2), np.float32)
weight[:, 1] = 1e-3
constants = {
    "step": np.float32(1), "fine": np.float32(1e-4), "zero": np.uint8(0), "weight": weight,
    "bias": np.zeros(2, np.float32),
}
nodes = [
    helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
    helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["levels"]),
    helper.make_node("Gemm", ["levels", "weight", "bias"], ["sums"]),
    helper.make_node("QuantizeLinear", ["sums", "fine", "zero"], ["y"]),
]
graph = helper.make_graph(
    nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
    [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 2])],
    [numpy_helper.from_array(value, name) for name, value in constants.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
x = np.full((1, 4), 3, np.float32)
wanted = [255, round(4 * 3 * 1e-3 / 1e-4)]
found = {}
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    (y,) = ort.InferenceSession(model, options).run(None, {"x": x})
    found[level] = y[0].tolist()
print(f"onnxruntime {ort.__version__}: wanted {wanted}, {found}")
if found != {"ORT_DISABLE_ALL": wanted, "ORT_ENABLE_BASIC": [255, 0], "ORT_ENABLE_ALL": [255, 0]}:
    raise SystemExit("it is otherwise now")
PY
