"""bench.inference: networks whose codes no engine can get wrong by rounding, checks before times, and the report."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace

import pytest
import torch
from bench import engines, inference, promises, report, workloads
from bench.workloads import Layer, Network, Workload
from torch import nn

import coarsegrad as cg
from coarsegrad.integer import WEIGHT_BITS


def _small_lenet():
    """The kinds of layers of LeNet-5."""
    activation = workloads._activation
    return nn.Sequential(
        activation(7, 1 / 127), nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4, affine=False), activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * 6 * 6, 20), nn.BatchNorm1d(20, affine=False), activation(), nn.Linear(20, 3),
    )  # fmt: skip


SMALL = {
    "mlp": Workload("MLP", lambda: workloads._perceptron(64, 96), (64,), (1, 3)),
    "conv14": Workload("convolutions", lambda: workloads._convolutions(8), (8, 9, 9), (2,)),
    "lenet": Workload("LeNet", _small_lenet, (1, 16, 16), (2,)),
}
ALWAYS_THERE = ["qrelu", "float32", "onednn"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Small networks in this process, whose output is captured; restores the number of threads."""
    for name, workload in SMALL.items():
        monkeypatch.setitem(workloads.WORKLOADS, name, workload)
    monkeypatch.setattr(inference, "in_new_process", lambda allocator, function, *arguments: function(*arguments))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(out, *options, workload="mlp"):
    inference.main(["--workloads", workload, "--quick", "--rounds", "5", "--out", str(out), *options])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def prepared(name, workload, batch=3):
    network = Network(SMALL[workload])
    with torch.no_grad():
        return engines.ENGINES[name].prepare(engines.Subject(network, network.input(batch), 1))


# ------------------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize("workload", SMALL)
def test_no_sum_is_close_to_a_threshold(workload):
    network, distances = Network(SMALL[workload]), []

    def look(qrelu, inputs):
        stairs = inputs[0] / qrelu.alpha.double() - 0.5  # whole at a threshold
        distances.append((stairs - stairs.round()).abs().min().item())

    simulated = network.simulated.double()
    for module in simulated[1:]:
        if isinstance(module, cg.QReLU):
            module.register_forward_pre_hook(look)
    simulated(network.input(4).double())
    assert distances and min(distances) > 2e-5


@pytest.mark.parametrize("workload", SMALL)
def test_the_forms_of_a_network_are_one_network(workload):
    network = Network(SMALL[workload])
    x = network.input(3)
    with torch.no_grad():
        wanted = network.simulated(x)
        torch.testing.assert_close(network.folded(x), wanted)
        torch.testing.assert_close(network.converted(8)(x), wanted)
        assert network.converted(8) is network.converted(8)
        assert not any(isinstance(module, cg.QReLU) for module in network.with_relu)
    layers = [step for step in network.steps if isinstance(step, Layer)]
    assert len(layers) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in network.simulated)
    done = network.converted(8).report
    assert len(done.converted) == len(layers) and {row.name for row in done.stayed} <= {"output"}
    for layer in layers:
        shape = [-1] + [1] * (layer.integers.dim() - 1)
        torch.testing.assert_close(layer.scale.view(shape) * layer.integers, layer.module.weight.detach())
        bias = layer.bias / (layer.scale * layer.alpha)
        torch.testing.assert_close(bias, bias.round(), rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------- the engines


@pytest.mark.parametrize("workload", SMALL)
@pytest.mark.parametrize("name", [engines.ours(bits) for bits in WEIGHT_BITS] + ALWAYS_THERE)
def test_an_engine_computes_the_network(name, workload):
    engine = prepared(name, workload)
    assert engine.error() <= engine.tolerance
    assert engine.weight_bytes > 0


@pytest.mark.parametrize("workload", SMALL)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "nbits4", "nbits2"])
def test_an_optional_engine_computes_the_network(name, workload):
    if missing := engines.ENGINES[name].missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not engines.ENGINES[name].suits(Network(SMALL[workload])):
        assert name.startswith("nbits") and workload != "mlp"
        return
    engine = prepared(name, workload)
    assert engine.error() <= engine.tolerance


def test_one_wrong_code_is_seen():
    """Of the hidden activation, in one of three inputs."""
    network = Network(SMALL["mlp"])
    x = network.input(3)
    subject = engines.Subject(network, x, 1)
    hidden = network.simulated[:3]

    def wrong():
        levels = hidden(x)
        levels[1, 5] += network.simulated[2].alpha.item()
        return network.simulated[3](levels)

    with torch.no_grad():
        right = engines.ENGINES["qrelu"].prepare(subject)
        assert right.error() <= right.tolerance < replace(right, run=wrong).error()
        assert replace(right, run=lambda: right.run()[:2]).error() == float("inf")
        assert not replace(right, run=lambda: right.run() * float("nan")).error() <= right.tolerance


def test_bit_for_bit():
    right = prepared("w8a4", "mlp")
    zeros = replace(right, expected=torch.zeros(2), run=lambda: torch.tensor([0.0, 1e-30]))
    assert right.tolerance == 0 == right.error() and not zeros.error() <= 0


# ----------------------------------------------------------------------------------------- the command


def test_rows(tmp_path, capsys):
    out = tmp_path / "inference.csv"
    run(out, "--batches", "1", "3", "--weight-bits", "8", "2", "--peers", "qrelu", "onednn")
    rows = rows_of(out)
    names = ["w8a4", "w2a4", "qrelu", "float32", "onednn"]
    assert [(row["batch"], row["engine"]) for row in rows] == [(batch, name) for batch in "13" for name in names]
    assert all(float(row["seconds_q20"]) <= float(row["seconds_median"]) <= float(row["seconds_q80"]) for row in rows)
    assert {row["speed_over_float32"] for row in rows if row["engine"] == "float32"} == {"1"}
    stored = {row["engine"]: int(row["weight_bytes"]) for row in rows}
    assert stored["float32"] == 4 * (2 * 64 * 96 + 64 + 96)
    assert stored["w2a4"] < stored["w8a4"] < stored["float32"] / 2
    assert {(row["threads"], row["clock"], row["rounds"]) for row in rows} == {("1", "process CPU time", "5")}
    assert all("oneDNN" in row["versions"] for row in rows)
    shown = capsys.readouterr().out
    assert "MLP, batch 3" in shown and "over onednn" in shown and f"Written: {out}" in shown


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("w8a4", lambda y: y + 1e-7, r"W8A4 on MLP, batch 3 is off by \S+ of its size, more than 0"),
        ("float32", lambda y: y + 1e-3, r"torch float32 on MLP, batch 3 is off by \S+ of its size, more than 1e-05"),
        ("onednn", lambda y: y[:1], r"oneDNN int8 on MLP, batch 3 is off by inf"),
        (
            "onednn",
            lambda y: y.no_such_method(),
            r"oneDNN int8 failed on MLP, batch 3 \(--peers leaves peers out\): 'T",
        ),
    ],
)
def test_a_wrong_engine_is_no_report(tmp_path, monkeypatch, name, wrong, message):
    right = engines.ENGINES[name]

    def prepare(subject):
        engine = right.prepare(subject)
        return replace(engine, run=lambda: wrong(engine.run()))

    monkeypatch.setitem(engines.ENGINES, name, replace(right, prepare=prepare))
    out = tmp_path / "inference.csv"
    with pytest.raises(SystemExit, match=message):
        run(out, "--batches", "3", "--weight-bits", "8", "--peers", "onednn")
    assert not out.exists()


def test_what_is_left_out_is_named(tmp_path, monkeypatch, capsys):
    absent = replace(engines.PEERS["openvino"], packages=("no_such_package",))
    kept = {"openvino": absent, "bfloat16": engines.PEERS["bfloat16"], "float32": engines.PEERS["float32"]}
    monkeypatch.setattr(inference, "PEERS", kept)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    out = tmp_path / "inference.csv"
    run(out, "--batches", "1", "--weight-bits", "8")
    shown = capsys.readouterr().out
    assert "Skipped: OpenVINO int8: not installed: no_such_package (pip install no_such_package)" in shown
    assert "Skipped: torch bfloat16: this CPU has no bfloat16 products" in shown
    assert {row["engine"] for row in rows_of(out)} == {"w8a4", "float32"}
    run(out, "--batches", "1", "--weight-bits", "8", "--peers", "bfloat16")
    assert {row["engine"] for row in rows_of(out)} == {"w8a4", "float32", "bfloat16"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workloads", "resnet"], "invalid choice: 'resnet'"),
        (["--peers", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--weight-bits", "3"], "invalid choice: 3"),
        (["--batches", "0"], "at least 1"),
        (["--rounds", "4"], "at least 5"),
    ],
)
def test_bad_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        inference.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_help_helps(capsys):
    with pytest.raises(SystemExit, match="0"):
        inference.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--weight-bits" in shown and "ffn 1 16 128 1024" in shown and "pip install -e .[engines]" in shown


# ------------------------------------------------------------------------------------------- the report


def test_report(tmp_path):
    run(tmp_path / "inference.csv", "--batches", "1", "3", "--weight-bits", "8", "4", "--peers", "onednn")
    page = tmp_path / "page.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    assert (tmp_path / "inference.png").stat().st_size > 0
    text = page.read_text()
    assert "| network | batch | W8A4 | W4A4 | torch float32 | oneDNN int8 |" in text
    assert re.search(r"\| MLP \| 3 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", text)
    assert "one thread" in text and "oneDNN 3" in text and "## The kernels" not in text


def test_verdicts():
    def results(sets, ours, theirs):
        times = {"w8a4": ours, "float32": theirs}
        rows = [
            {"workload": "mlp", "batch": "128", "engine": name, "seconds_median": time, "instruction_sets": sets}
            for name, time in times.items()
        ]
        return {"inference": rows}

    promise = promises._faster("mlp", 128, 8, "float32", 4, needs="amx_int8")
    assert promise.verdict(results("avx2 amx_int8", "1", "4")) == "met"
    assert promise.verdict(results("avx2 amx_int8", "1", "2")) == "missed by 100%"
    assert promise.verdict(results("avx2", "1", "4")) == "not run on this machine"
    assert promise.verdict({"inference": []}) == "not measured"


def test_promises_are_about_what_is_there():
    """Of those about this machine's instruction sets, each finds its rows in the committed results."""
    results = report.load(report.RESULTS)
    about = [promise for promise in promises.INFERENCE_PROMISES if promise.is_about(results)]
    assert not results["inference"] or all(promise.time(results) is not None for promise in about)
    claims = {(promise.claim, promise.needs) for promise in promises.INFERENCE_PROMISES}
    assert len(claims) == len(promises.INFERENCE_PROMISES)
    missed = [promise for promise in about if promise.verdict(results).startswith("missed")]
    assert all(promise.tried for promise in missed), [promise.claim for promise in missed if not promise.tried]
