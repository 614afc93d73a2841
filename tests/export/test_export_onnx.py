"""ONNX files: the codes that runtimes compute from them, the operators that they fuse, and what is refused."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad.__main__ import main
from coarsegrad.gated import ACTIVATIONS

FORMS = ("qdq", "qonnx", "levels")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


exports = needs("onnx", "onnxscript")
runs = needs("onnx", "onnxscript", "onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")


def onnxruntime_run(path, *inputs, optimized=None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {meta.name: x.numpy() for meta, x in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(y) for y in session.run(None, given)]


def qonnx_run(path, *inputs):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(str(path))
    names = [value.name for value in model.graph.input]
    for name, x in zip(names, inputs):
        model.set_tensor_shape(name, list(x.shape))
    found = execute_onnx(model.transform(InferShapes()), {name: x.numpy() for name, x in zip(names, inputs)})
    return [torch.from_numpy(found[value.name]) for value in model.graph.output]


def openvino_model(path):
    import openvino

    # On CPUs with bfloat16 OpenVINO computes float layers in it if not told otherwise.
    return openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def runner(form):
    return qonnx_run if form == "qonnx" else onnxruntime_run


def skip_without(form):
    package = "qonnx" if form == "qonnx" else "onnxruntime"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"not installed: {package}")


# ----------------------------------------------------------------------------------------- the staircases


class Staircases(nn.Module):
    """Several of one input."""

    def __init__(self):
        super().__init__()
        per_channel = {"num_channels": 3, "channel_dim": 1, "alpha": torch.tensor([0.3, 0.7, 1.9])}
        self.all = nn.ModuleList(
            [
                cg.QReLU(1, rounding="ceil", alpha=0.3),
                cg.QReLU(4, rounding="ceil", alpha=0.1),
                cg.QReLU(3, rounding="nearest", alpha=0.3),
                cg.QReLU(2, rounding="hwgq", **per_channel),
                cg.QReLU(2, rounding="ceil", **per_channel),
                cg.QReLU(8, rounding="nearest", alpha=0.013),
                cg.QSigned(3, alpha=0.3),
                cg.QSigned(8, alpha=0.01),
            ]
        )

    def forward(self, x):
        return tuple(staircase(x) for staircase in self.all)

    def inputs(self):
        """(x [n, 3], which of its rows are no thresholds of any)."""
        halves = torch.cat([(torch.arange(-300, 300) / 2)[:, None] * m.alpha.double() for m in self.all], 1).flatten()
        edges = halves.float().unique()
        rows = [edges, *(torch.nextafter(edges, torch.full_like(edges, end)) for end in (torch.inf, -torch.inf))]
        plain = torch.cat([torch.randn(500) * 3, torch.tensor([torch.inf, -torch.inf, 1e30, -0.0])])
        x = torch.cat([*rows, plain])[:, None].repeat(1, 3)
        return x, torch.arange(len(x)) >= 3 * len(edges)


@exports
@pytest.mark.parametrize("form", FORMS)
def test_staircases(form, tmp_path):
    skip_without(form)
    model = Staircases().eval()
    x, generic = model.inputs()
    cg.export_onnx(model, (x[:2],), tmp_path / "model.onnx", form=form)
    for staircase, wanted, got in zip(model.all, model(x), runner(form)(tmp_path / "model.onnx", x)):
        if form == "qdq":  # on a threshold and an ulp beside it the code may be the other one
            assert torch.equal(wanted[generic], got[generic]), staircase
            assert bool(((wanted - got).abs() <= staircase.alpha * 1.01).all()), staircase
        else:
            assert torch.equal(wanted, got), staircase


class _OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.staircase = cg.QReLU(4)

    def forward(self, inputs):
        return {"y": self.staircase(inputs["a"]) * inputs["b"]}


@runs
def test_an_input_that_is_a_dict(tmp_path):
    model, inputs = _OfDict().eval(), {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    cg.export_onnx(model, (inputs,), tmp_path / "model.onnx", form="levels")
    (got,) = onnxruntime_run(tmp_path / "model.onnx", *(t[:2] for t in inputs.values()))
    assert torch.equal(got, model(inputs)["y"][:2])


@exports
@needs("qonnx")
def test_thresholds_of_one_dimension(tmp_path):
    model, x = nn.Sequential(cg.QReLU(4)).eval(), torch.randn(50) * 3
    cg.export_onnx(model, (x,), tmp_path / "model.onnx", form="qonnx")
    assert torch.equal(qonnx_run(tmp_path / "model.onnx", x)[0], model(x))


@exports
@runs
def test_nan_and_other_dtypes(tmp_path):
    """In "levels" NaN stays NaN, and numbers of 16 bits have their own levels; in "qdq" NaN has code 0."""
    x = torch.tensor([[torch.nan, 1.0, 3.0]]).repeat(4, 1)
    model = Staircases().eval()
    cg.export_onnx(model, (x.half(),), tmp_path / "levels.onnx", form="levels")
    for wanted, got in zip(model(x.half()), onnxruntime_run(tmp_path / "levels.onnx", x.half())):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    cg.export_onnx(nn.Sequential(cg.QReLU(4)).eval(), (x,), tmp_path / "qdq.onnx")
    assert onnxruntime_run(tmp_path / "qdq.onnx", x)[0][0, 0] == 0
    with pytest.raises(ValueError, match="reads float64, which QuantizeLinear does not: form must be 'levels'"):
        cg.export_onnx(nn.Sequential(cg.QReLU(4)).eval(), (x.double(),), tmp_path / "double.onnx")


class _Gated(nn.Module):
    def forward(self, gate, up):
        return tuple(cg.gated_product(gate, up, activation) for activation in ACTIVATIONS)


@runs
def test_gated_products(tmp_path):
    model, inputs = _Gated().eval(), (torch.randn(5, 8), torch.randn(5, 8))
    cg.export_onnx(model, inputs, tmp_path / "model.onnx")
    torch.testing.assert_close(onnxruntime_run(tmp_path / "model.onnx", *inputs), list(model(*inputs)))


# ----------------------------------------------------------------------------------- layers of integers


class Codes(nn.Module):
    """Layers that read codes and write codes, of every kind that `convert` makes. Its input goes into a staircase."""

    def __init__(self):
        super().__init__()
        per_channel = {"num_channels": 8, "channel_dim": 1}
        self.images = nn.Sequential(
            cg.QReLU(4, alpha=0.25),
            nn.Conv2d(4, 8, 3, padding=1, groups=2),
            nn.BatchNorm2d(8),
            cg.QReLU(3, rounding="nearest", alpha=0.21),
            nn.MaxPool2d(3, 2, padding=1, dilation=2),
            nn.Conv2d(8, 8, (3, 1), stride=2, dilation=(1, 2)),
            nn.BatchNorm2d(8),
            cg.QReLU(2, rounding="hwgq", alpha=torch.linspace(0.3, 0.5, 8), **per_channel),
            nn.AvgPool2d((1, 2)),
        )
        self.rows = nn.Sequential(nn.Linear(8, 16), cg.QReLU(2, alpha=0.2), nn.Linear(16, 12))
        self.last = cg.QReLU(4, alpha=0.05)
        self.floats = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
        with torch.no_grad():
            for norm in (self.images[2], self.images[6], self.floats[1]):
                norm.weight.uniform_(-1, 1)
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        pooled = self.images[:5](x)
        codes = self.images[5:](pooled).flatten(2).transpose(1, 2)  # [N, places, channels]
        out = self.rows(codes)
        return out, self.last(out[..., ::2]), self.floats(pooled), pooled


@pytest.fixture(scope="module")
def codes():
    torch.manual_seed(3)
    model = Codes().eval()
    x = torch.randn(5, 4, 16, 16)
    bits = {"images.1": 8, "images.5": 4, "rows.0": 2, "rows.2": 1}
    return cg.convert(model, (x,), weight_bits=bits), x


@exports
@pytest.mark.parametrize("form", ["qonnx", "levels"])
def test_exact_forms_of_integer_layers(form, codes, tmp_path):
    skip_without(form)
    converted, x = codes
    cg.export_onnx(converted, (x[:1],), tmp_path / "model.onnx", form=form)
    wanted, got = converted(x), runner(form)(tmp_path / "model.onnx", x)
    for at in (1, 3):
        assert torch.equal(wanted[at], got[at])
    for at in (0, 2):
        torch.testing.assert_close(got[at], wanted[at], rtol=1e-6, atol=1e-6)


def optimized_ops(path):
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def share(wanted, got):
    return (wanted != got).double().mean().item()


@runs
def test_onnxruntime_computes_with_integers(codes, tmp_path):
    converted, x = codes
    cg.export_onnx(converted, (x,), tmp_path / "model.onnx")
    wanted, got = converted(x), onnxruntime_run(tmp_path / "model.onnx", x, optimized=tmp_path / "optimized.onnx")
    assert share(wanted[1], got[1]) < 0.01 and share(wanted[3], got[3]) < 0.01
    torch.testing.assert_close(got[2], wanted[2], rtol=0, atol=5e-3)
    ops = optimized_ops(tmp_path / "optimized.onnx")
    # Of the convolution before a staircase that rounds by hwgq a float is read too; another has a float output.
    assert ops.count("QLinearConv") == 1 and ops.count("QGemm") == 2 and ops.count("Conv") == 2
    assert ops.count("MaxPool") == 1 and "Gemm" not in ops and "MatMul" not in ops


def lenet(activation):
    return nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), activation(), nn.MaxPool2d(2), nn.Conv2d(8, 32, 5), nn.BatchNorm2d(32),
        activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 256), activation(), nn.Linear(256, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(5)
    relu, model = lenet(nn.ReLU), lenet(lambda: cg.QReLU(4, alpha=0.1))
    model.load_state_dict(relu.state_dict(), strict=False)
    x = torch.randn(16, 1, 28, 28)
    return relu, model, cg.convert(model, (x,)), x


@runs
def test_sizes_and_operators_of_lenet(networks, tmp_path):
    relu, model, converted, x = networks
    for name, network in (("relu", relu), ("model", model), ("converted", converted)):
        cg.export_onnx(network, (x,), tmp_path / name)
    sizes = {name: os.path.getsize(tmp_path / name) for name in ("relu", "model", "converted")}
    assert sizes["converted"] < 0.28 * sizes["relu"] and sizes["model"] < 1.02 * sizes["relu"]
    with torch.no_grad():
        (got,) = onnxruntime_run(tmp_path / "converted", x, optimized=tmp_path / "optimized.onnx")
        assert torch.equal(got.argmax(1), converted(x).argmax(1))
        # The bias of the last layer is rounded to its sums' unit, and a code at a time may differ.
        torch.testing.assert_close(got, converted(x), rtol=0, atol=0.05)
        # Were the weights of the layers that stay float rounded to 8 bits, this would be far off.
        (got,) = onnxruntime_run(tmp_path / "model", x)
        torch.testing.assert_close(got, model(x), rtol=0, atol=1e-5)
    wanted = "Conv QuantizeLinear MaxPool Min QLinearConv MaxPool Min Reshape QGemm Min QGemm".split()
    layout = ("Transpose", "ReorderInput", "ReorderOutput")
    ops = [op.removeprefix("Nhwc") for op in optimized_ops(tmp_path / "optimized.onnx") if op not in layout]
    assert ops == wanted


@exports
@needs("openvino")
def test_openvino_computes_with_integers(networks, codes, tmp_path):
    for (converted, x), layers in ((networks[2:], 3), (codes, 5)):
        cg.export_onnx(converted, (x,), tmp_path / "model.onnx")
        compiled = openvino_model(tmp_path / "model.onnx")
        found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        kinds = [(str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in found]
        assert sum(kind in (("Convolution", "u8"), ("FullyConnected", "u8")) for kind in kinds) == layers
        with torch.no_grad():
            wanted, got = converted(x), compiled(x.numpy())
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        assert np.abs(got[0] - wanted.numpy()).mean() < 0.01


class _Logits(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, ids):
        return self.network(input_ids=ids, use_cache=False).logits


@runs
@needs("transformers")
def test_a_block_of_opt(tmp_path):
    from transformer_models import opt

    network, batch = opt(layers=1)
    cg.quantize_(network, bits=4)
    ids = batch["input_ids"]
    converted = cg.convert(_Logits(network).eval(), (ids,))
    assert len(converted.report.converted) == 1
    cg.export_onnx(converted, (ids,), tmp_path / "model.onnx")
    (got,) = onnxruntime_run(tmp_path / "model.onnx", ids[:3], optimized=tmp_path / "optimized.onnx")
    torch.testing.assert_close(got, converted(ids[:3]), rtol=0, atol=2e-3)
    assert optimized_ops(tmp_path / "optimized.onnx").count("QGemm") == 1


# ------------------------------------------------------------------------------- the file, and the inputs


@runs
@pytest.mark.parametrize("opset", [21, 27])
def test_opsets(opset, codes, tmp_path):
    import onnx

    converted, x = codes
    cg.export_onnx(converted, (x,), tmp_path / "model.onnx", opset=opset)
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "model.onnx").opset_import}[""] == opset
    assert share(converted(x)[1], onnxruntime_run(tmp_path / "model.onnx", x)[1]) < 0.01


@exports
def test_a_failed_export_changes_no_file(tmp_path, monkeypatch):
    path, model, x = tmp_path / "model.onnx", nn.Sequential(cg.QReLU(4)).eval(), torch.randn(3, 4)
    for before in ([], ["model.onnx"]):
        for name in before:
            (tmp_path / name).write_text("what was there")
        with monkeypatch.context() as patch:
            import torch.onnx._internal.exporter._onnx_program as programs

            def half(self, destination, **options):
                with open(destination, "w") as file:
                    file.write("half")
                raise OSError("the disk is full")

            patch.setattr(programs.ONNXProgram, "save", half)
            with pytest.raises(OSError, match="the disk is full"):
                cg.export_onnx(model, (x,), path)
        assert os.listdir(tmp_path) == before and all(path.read_text() == "what was there" for _ in before)
    cg.export_onnx(model, (x,), path)
    assert os.listdir(tmp_path) == ["model.onnx"] and str(tmp_path.parent).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()  # no line of this machine


@runs
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_translations_for_torchs_own_exporter(tmp_path):
    model = Staircases().eval()
    x, generic = model.inputs()
    torch.onnx.export(
        model, (x[:2],), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},),
        custom_translation_table=cg.onnx_translations(), verbose=False,
    )  # fmt: skip
    for staircase, wanted, got in zip(model.all, model(x), onnxruntime_run(tmp_path / "model.onnx", x)):
        assert torch.equal(wanted[generic], got[generic]), staircase
        assert bool(((wanted - got).abs() <= staircase.alpha * 1.01).all()), staircase


@runs
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("exporter", ["torch's", "levels"])
def test_staircases_in_one_op_with_layers(exporter, tmp_path):
    linear, settings = nn.Linear, {"alpha": 0.2, "rounding": "hwgq"}
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), cg.nn.QReLUConv2d(cg.QReLU(2, **settings), nn.Conv2d(2, 2, 1)), nn.Flatten(),
        cg.nn.QReLULinear(cg.QReLU(3), linear(8, 8)),
        cg.nn.QReLUMLP(linear(8, 16), cg.QReLU(3, **settings, squared=True), linear(16, 8)),
        cg.nn.QReLUGatedMLP(linear(8, 16), cg.QReLU(2), linear(8, 16), cg.QReLU(2), linear(16, 4)),
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    x, path = torch.randn(4, 8), tmp_path / "model.onnx"
    if exporter == "levels":
        cg.export_onnx(model, (x,), path, form="levels")
    else:
        table = cg.onnx_translations()
        torch.onnx.export(model, (x,), path, dynamo=True, custom_translation_table=table, verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(onnxruntime_run(path, x)[0], model(x), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- the command


@runs
@pytest.mark.filterwarnings("error:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_command(networks, tmp_path, capfd):
    _, model, converted, x = networks
    program, out = tmp_path / "model.pt2", tmp_path / "model.onnx"
    batch = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=batch, strict=False), program)
    main(["export", "--convert", "8", str(program), str(out), "--opset", "20"])
    shown, noise = capfd.readouterr()
    assert not noise  # of torch's exporter
    assert "3 integer layers" in shown and f"{out}: {out.stat().st_size:,} bytes, form qdq, opset 20" in shown
    with torch.no_grad():
        torch.testing.assert_close(onnxruntime_run(out, x[:3])[0], converted(x[:3]), rtol=0, atol=0.05)
    (tmp_path / "text.pt2").write_text("no program")
    torch.export.save(torch.export.export(nn.Dropout(0.5), (x,)), tmp_path / "training.pt2")
    torch.export.save(torch.export.export(model, (x[:1],), strict=False), tmp_path / "one.pt2")
    for arguments, message in (
        ([str(tmp_path / "one.pt2"), str(out)], "one.pt2 must have inputs of two examples or more, got one"),
        ([str(tmp_path / "none.pt2"), str(out)], "none.pt2"),
        ([str(tmp_path / "text.pt2"), str(out)], "is no program that torch.export.save wrote"),
        ([str(tmp_path / "training.pt2"), str(out)], "must be of a network in evaluation mode"),
        ([str(program), str(out), "--opset", "3"], "opset must be in"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", *arguments])


def test_help_helps(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["export", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "torch.export.save" in shown and "qonnx MultiThreshold" in shown and "--convert" in shown


# -------------------------------------------------------------------------------------------- what is refused


@exports
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"form": "int8"}, ValueError, "unknown form 'int8', must be one of 'qdq', 'qonnx', 'levels'"),
        ({"opset": 28}, ValueError, r"opset must be in 18\.\.27, got 28"),
        ({"opset": 17}, ValueError, r"opset must be in 18\.\.27, got 17"),
        ({"opset": "18"}, TypeError, "opset must be an int, got '18'"),
        ({"model": "net"}, TypeError, "model must be an nn.Module, got str"),
        ({"model": nn.Sequential(cg.QReLU(4))}, ValueError, "model must be in evaluation mode"),
        ({"example_inputs": torch.randn(2, 3)}, TypeError, "example_inputs must be a tuple of arguments, got Tensor"),
        ({"example_inputs": (torch.randn(2, 3), 1)}, ValueError, "model must run on example_inputs: TypeError"),
        ({"path": "no/such/folder/model.onnx"}, FileNotFoundError, "path must be in a folder that exists, got no/such"),
        ({"path": "."}, IsADirectoryError, "path must be that of a file, but . is a folder"),
        ({"path": None}, TypeError, "path must be a str or a path, got None"),
        ({"model": nn.Sequential(cg.QSigned(4)).eval()}, ValueError, "a signed staircase with dynamic alphas"),
        ({"model": nn.Linear(3, 3, device="meta").eval()}, ValueError, "model must hold values, but weight"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message, tmp_path):
    given = {
        "model": nn.Sequential(cg.QReLU(4)).eval(), "example_inputs": (torch.randn(2, 3),),
        "path": tmp_path / "model.onnx", **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        cg.export_onnx(**given)
    assert not os.listdir(tmp_path)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    for call in (cg.onnx_translations, lambda: cg.export_onnx(nn.ReLU(), (), tmp_path / "model.onnx")):
        with pytest.raises(ImportError, match="ONNX export needs .*onnxscript: pip install onnx onnxscript"):
            call()
