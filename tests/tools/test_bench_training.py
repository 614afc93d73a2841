"""bench.training: its rows, and that it reports nothing where a gradient is wrong."""

from __future__ import annotations

import csv
import functools

import pytest
import torch
from bench import training
from bench.networks import ReluNetwork
from torch import nn

import coarsegrad as cg


def _small(activation, dropout):
    return nn.Sequential(nn.Linear(8, 8), activation(), nn.Linear(8, 2))


@pytest.fixture(autouse=True)
def small_and_here(monkeypatch):
    monkeypatch.setattr(training, "NETWORKS", {"mlp": ReluNetwork(_small, lambda: torch.randn(16, 8))})
    monkeypatch.setattr(training, "in_new_process", lambda allocator, function, *arguments: function(*arguments))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_and_table(tmp_path, capsys):
    out = tmp_path / "training.csv"
    training.main(["--networks", "mlp", "--rounds", "3", "--threads", "1", "--out", str(out)])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [(row["mode"], row["activation"]) for row in rows if row["pass"] == "step"]
    assert steps == [(mode, a) for mode in ("eager", "compiled") for a in ("none", "relu", "qrelu", "qrelu, packed")]
    assert [(row["mode"], row["activation"]) for row in rows if row["pass"] == "inference"] == [
        step for step in steps if step[1] != "qrelu, packed"
    ]
    assert {row["network"] for row in rows} == {"mlp"} and {row["dtype"] for row in rows} == {"float32"}
    assert {(row["pass"], row["mode"]) for row in rows if row["seconds_to_compile"]} == {("step", "compiled")}
    assert all(float(row["seconds_q20"]) <= float(row["seconds_median"]) <= float(row["seconds_q80"]) for row in rows)
    assert all(float(row["share_of_activation_median"]) == 0 for row in rows if row["activation"] == "none")
    assert all(float(row["time_over_relu_median"]) == 1 for row in rows if row["activation"] == "relu")
    assert all(row["git"] is not None and row["threads"] == "1" and row["rounds"] == "3" for row in rows)
    printed = capsys.readouterr().out
    assert "mlp, float32, 1 threads" in printed and "qrelu, packed" in printed and f"Written: {out}" in printed


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_no_report_where_a_gradient_is_wrong(tmp_path, monkeypatch, mode):
    class Wrong(nn.Module):
        def forward(self, x):
            return cg.qrelu(x, 0.5, 2) * 1.5

    right = training._run

    def run(model, how):
        if how == mode and any(isinstance(module, cg.QReLU) for module in model.modules()) and model._forward_hooks:
            model[1] = Wrong()
        return right(model, "eager")

    monkeypatch.setattr(training, "_run", run)
    out = tmp_path / "training.csv"
    with pytest.raises(SystemExit, match=f"a gradient of mlp in float32 with qrelu, packed, {mode}, differs from "):
        training.main(["--networks", "mlp", "--rounds", "2", "--threads", "1", "--out", str(out)])
    assert not out.exists()
