#!/usr/bin/env bash
# onnxruntime 1.32.0: a quantized Gemm runs in integers (QGemm) only if the DequantizeLinear of its weights states a zero
# point. It is optional and 0 if left out, and Conv and MatMul become integer without it; Gemm computes in floats without a
# word.
# Seen: QLinearConv and QLinearMatMul either way; Gemm without the zero point, QGemm with it. The bias needs none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" -W ignore - "$folder/optimized.onnx" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N = 64, 48
SHAPES = {"Gemm": (N, K), "MatMul": (K, N), "Conv": (N, K, 1, 1)}
INPUTS = {"Gemm": (4, K), "MatMul": (4, K), "Conv": (4, K, 1, 1)}


def operators(op, zero_point):
    """Those that onnxruntime runs for QuantizeLinear, DequantizeLinear, op with quantized weights, QuantizeLinear."""
    axis = 1 if op == "MatMul" else 0
    weight = np.random.default_rng(0).integers(-127, 128, SHAPES[op]).astype(np.int8)
    constants = {
        "weight": weight, "scale": np.full(N, 1e-3, np.float32), "zero": np.zeros(N, np.int8),
        "bias": np.ones(N, np.int32), "bias_scale": np.full(N, 1e-4, np.float32),
        "step": np.float32(0.1), "start": np.uint8(0),
    }
    weights = ["weight", "scale"] + (["zero"] if zero_point else [])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "start"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "start"], ["levels"]),
        helper.make_node("DequantizeLinear", weights, ["floats"], axis=axis),
    ]
    operands = ["levels", "floats"]
    if op != "MatMul":
        nodes.append(helper.make_node("DequantizeLinear", ["bias", "bias_scale"], ["shift"], axis=0))
        operands.append("shift")
    nodes += [
        helper.make_node(op, operands, ["sums"], **({"transB": 1} if op == "Gemm" else {})),
        helper.make_node("QuantizeLinear", ["sums", "step", "start"], ["y"]),
    ]
    output = INPUTS[op][:1] + (N,) + INPUTS[op][2:]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, INPUTS[op])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = sys.argv[1], 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.random.default_rng(1).random(INPUTS[op], np.float32)})
    return [node.op_type for node in onnx.load(sys.argv[1]).graph.node]


WANTED = {"Conv": ("QLinearConv",) * 2, "MatMul": ("QLinearMatMul",) * 2, "Gemm": ("Gemm", "QGemm")}
for op, wanted in WANTED.items():
    for zero_point, runs in zip((False, True), wanted):
        found = operators(op, zero_point)
        stated = "with" if zero_point else "without"
        print(f"onnxruntime {onnxruntime.__version__}, {op}, {stated} a zero point: {', '.join(found)}")
        assert runs in found
PY
