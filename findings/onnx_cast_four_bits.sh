#!/usr/bin/env bash
# onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1: the ONNX documentation (technical details, "4 bit integer types" and "2 bit
# integer types") has a Cast to these types round to the nearest integer, ties to even. Guess before the run: Cast truncates to
# integers of any width, in the reference and in onnxruntime.
# Seen: none follows the rule. The ReferenceEvaluator truncates to every width. onnxruntime and OpenVINO truncate to 8 bits
# and more, and round to 4 (onnxruntime also to 2) with ties away from zero. So as UINT4 1.7 is 1 in the reference and 2 in
# both engines, and 2.5 is 2 and 3; as UINT8 1 and 2 in all. QuantizeLinear with a scale of 1 has ties to even in the
# reference and onnxruntime, and a Round before the Cast makes all three equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

SIGNED = numpy.array([0.2, 0.5, 0.7, 1.2, -0.5, -0.7, -1.5, -1.7], numpy.float32)
UNSIGNED = numpy.array([0.2, 0.5, 0.7, 1.2, 1.5, 1.7, 2.2, 2.5], numpy.float32)


def away(x):
    return numpy.copysign(numpy.floor(numpy.abs(x) + 0.5), x)


def model_of(nodes, constants=()):
    of_floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", of_floats[:1], of_floats[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    return model


def cast(kind, rounds=False):
    nodes = [helper.make_node("Round", ["x"], ["even"])] if rounds else []
    nodes.append(helper.make_node("Cast", ["even" if rounds else "x"], ["codes"], to=kind))
    return model_of([*nodes, helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)])


def quantize(kind):
    nodes = [helper.make_node(name + "Linear", [x, "scale", "zero"], [y]) for name, x, y in (
        ("Quantize", "x", "codes"), ("Dequantize", "codes", "y"))]  # fmt: skip
    return model_of(nodes, [helper.make_tensor("scale", TensorProto.FLOAT, [], [1]), helper.make_tensor("zero", kind, [], [0])])


def reference(model, x):
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def runtime(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def vino(model, x):
    core = openvino.Core()
    return core.compile_model(core.read_model(model=model.SerializeToString()), "CPU")({0: x})[0]


def same(got, wanted):
    return numpy.asarray(got, numpy.float32).tolist() == wanted.astype(numpy.float32).tolist()


print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}")
for name in ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT32"):
    kind, x, low = getattr(TensorProto, name), UNSIGNED if name[0] == "U" else SIGNED, name[-1] in "24" and name != "INT32"
    engines = [runtime] if name[-1] == "2" and low else [runtime, vino]  # OpenVINO has no 2 bits in Cast.
    found = [engine(cast(kind), x) for engine in (reference, *engines)]
    print(f"Cast to {name} of {[round(v, 1) for v in x.tolist()]}: {[y.tolist() for y in found]}")
    assert same(found[0], numpy.trunc(x))
    assert all(same(y, away(x) if low else numpy.trunc(x)) for y in found[1:])
    assert all(same(engine(cast(kind, rounds=True), x), numpy.rint(x)) for engine in (reference, *engines))
    if name != "INT32":
        assert all(same(engine(quantize(kind), x), numpy.rint(x)) for engine in (reference, runtime))
PY
