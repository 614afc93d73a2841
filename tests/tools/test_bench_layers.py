"""bench.layers: layers are compared with exact sums before they are timed, and the page follows from the CSV file."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest
import torch
from bench import against, layers, report
from bench.layers import BASE, NUMBERS, Layer

import coarsegrad as cg
from coarsegrad import _ops

pytestmark = pytest.mark.usefixtures("measured_here")
SMALL = {
    "linear": Layer(40, 12, batches=(1, 3)),
    "conv": Layer(6, 8, 5, kernel=3),
    "conv, stride 2": Layer(6, 8, 5, kernel=3, stride=2),
    "depthwise": Layer(8, 8, 5, kernel=3, groups=8),
}
LINEAR = ["--only", "linear", "--rounds", "5"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", SMALL)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_their_page(tmp_path, capsys):
    out, page = tmp_path / "layers.csv", tmp_path / "page.md"
    layers.main(["--rounds", "5", "--out", str(out)])
    rows = rows_of(out)
    cases = [(name, str(batch)) for name, layer in SMALL.items() for batch in layer.batches]
    assert [(row["layer"], row["batch"], row["numbers"]) for row in rows] == [
        (*case, numbers) for case in cases for numbers in (BASE, *NUMBERS)
    ]
    for row in rows:
        for name in ("seconds", "speed_over_float32"):
            assert 0 < float(row[f"{name}_q20"]) <= float(row[f"{name}_q80"])
        rate = int(row["products"]) / float(row["seconds_median"]) / 1e9
        assert float(row["billions_per_second"]) == pytest.approx(rate, rel=1e-3)
    assert {row["speed_over_float32"] for row in rows if row["numbers"] == BASE} == {"1"}
    assert {(row["threads"], row["clock"], row["rounds"]) for row in rows} == {("1", "thread CPU time", "5")}
    shown = capsys.readouterr().out
    assert "6 -> 8 at 5 x 5" in shown and f"Written: {out}" in shown

    report.main(["--results", str(tmp_path), "--page", str(page)])
    table = page.read_text().split("## Layers on codes\n")[1]
    assert "| layer |  | batch | float32, us | W8A8 | W8A4 | W4A4 | W2A4 | W1A4 |" in table
    assert len(re.findall(r"^\| (linear|conv|depthwise)", table, re.MULTILINE)) == len(cases)
    speed = next(float(row["speed_over_float32"]) for row in rows if row["numbers"] == "w8a8")
    assert re.search(rf"^\| linear \| 40 -> 12 \| 1 \| \d+ \| {re.escape(f'{speed:.3g}')} \|", table, re.MULTILINE)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_products(name, batch):
    """As many as there are weights of a channel for each output."""
    _, weight, sums = layers._inputs(SMALL[name], batch, 4, 4)
    assert SMALL[name].products(batch) == sums.numel() * weight[0].numel()


@pytest.mark.parametrize("name", SMALL)
def test_codes_are_between_the_ends(name):
    """Else most sums could be wrong and their codes right."""
    for numbers, (_, bits) in NUMBERS.items():
        codes = layers._on_codes(numbers, SMALL[name], 3)().flatten().long()
        assert (codes.bincount(minlength=2**bits)[1:-1].sum() > 0.6 * codes.numel()) and codes.unique().numel() > 6


def wrong(method):
    def call(self, *arguments):
        out = method(self, *arguments).clone()
        if out.dtype != torch.float64:
            out.view(-1)[-1] += 1 if out.dtype == torch.uint8 else 1e3
        return out

    return call


@pytest.mark.parametrize("method, numbers", [("on_codes", "w8a8"), ("in_floats", BASE)])
def test_a_wrong_layer_is_no_report(tmp_path, monkeypatch, capsys, method, numbers):
    monkeypatch.setattr(Layer, method, wrong(getattr(Layer, method)))
    out = tmp_path / "layers.csv"
    with pytest.raises(SystemExit, match=f"{numbers} of a layer 40 -> 12, batch 1, differs .*; no times are reported"):
        layers.main([*LINEAR, "--out", str(out)])
    assert not out.exists() and "40 -> 12" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--rounds", "4"], "at least 5"),
        (["--against", "no/such/folder"], "no/such/folder is no checkout, it has no python/coarsegrad"),
        (["--against", str(against.ROOT), "--threads", "2"], "compares one thread of a CPU"),
    ],
)
def test_bad_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        layers.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")
def test_builds_in_turns(tmp_path, monkeypatch, capsys):
    """This one and itself; their processes have the table as it is, of which this is the quickest."""
    monkeypatch.setattr(layers, "LAYERS", {"conv 1 x 1": Layer(256, 64, 14)})
    out = tmp_path / "against.csv"
    (tmp_path / "python").mkdir()
    os.symlink(Path(cg.__file__).parent, tmp_path / "python" / "coarsegrad")
    layers.main(["--against", str(tmp_path), "--rounds", "5", "--out", str(out)])
    rows = rows_of(out)
    assert [(row["layer"], row["batch"], row["numbers"]) for row in rows] == [
        ("conv 1 x 1", "1", numbers) for numbers in (BASE, *NUMBERS)
    ]
    assert all(float(row["time_over_other"]) > 0 and row["other_backend"] == row["backend"] for row in rows)
    shown = capsys.readouterr().out
    assert re.search(r"layer +batch +numbers +us +other, us", shown) and "bench.report" not in shown
    assert f"lower than in {tmp_path} by more than 2%" in shown
