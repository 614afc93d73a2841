#!/usr/bin/env bash
# onnx 1.23.2: QuantizeLinear saturates, says its specification. Guess before the run: the ReferenceEvaluator of the same
# package and onnxruntime 1.32.0 give the highest code for every large quotient.
# Seen (x86-64): onnxruntime does, for integers of 2 to 16 bits. The reference does too up to the largest float32 below 2**31;
# from 2**31 on, infinity included, it gives the lowest code, 0 or -128, as for the most negative numbers: it saturates
# after a conversion to int32. For float8 both saturate. A test that holds an engine to the reference sees a fault of
# the engine in a large activation, or none in one that maps it to 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import platform

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

BELOW = float(numpy.nextafter(numpy.float32(2.0**31), numpy.float32(0)))
X = numpy.array([3.0, 1e6, BELOW, 2.0**31, 1e30, numpy.inf, -1e6, -1e30, -numpy.inf], numpy.float32)


def codes(kind):
    """Of both, as floats."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    constants = [helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0]), helper.make_tensor("zero", kind, [], [0])]
    of_floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(X)]) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", of_floats[:1], of_floats[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return (run(None, {"x": X})[0].tolist() for run in (ReferenceEvaluator(model).run, session.run))


print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}; of {X.tolist()}:")
for kind, low, high in (
    ("UINT2", 0, 3), ("INT2", -2, 1), ("UINT4", 0, 15), ("INT4", -8, 7),
    ("UINT8", 0, 255), ("INT8", -128, 127), ("UINT16", 0, 65535), ("INT16", -32768, 32767),
):  # fmt: skip
    reference, engine = codes(getattr(TensorProto, kind))
    print(f"{kind}: reference {reference}, onnxruntime {engine}")
    small = min(3, high)
    assert engine == [small, high, high, high, high, high, low, low, low]
    assert reference == [small, high, high, low, low, low, low, low, low]

reference, engine = codes(TensorProto.FLOAT8E4M3FN)
assert reference == engine == [3, 448, 448, 448, 448, 448, -448, -448, -448]
PY
