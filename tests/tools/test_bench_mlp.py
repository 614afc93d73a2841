"""bench.mlp without a GPU: what it measures and compares, and that it publishes nothing of a CPU. tests/triton_mlp.py
has the peer in Triton."""

from __future__ import annotations

import csv

import pytest
import torch
from bench import mlp, report
from bench.timing import BenchError

SHAPE, GATED = "OPT-1.3B, 4,096 tokens", "Mistral-7B, gated, 4,096 tokens"


@pytest.fixture
def small(monkeypatch):
    """Sizes of which an eighth is a few numbers; one process; nothing compiled."""
    for shape in (SHAPE, GATED):
        monkeypatch.setitem(mlp.SHAPES, shape, (128, 256, 512, 192))
    monkeypatch.setitem(mlp.WAYS, mlp.BASE, mlp.WAYS["nn.ReLU"])
    monkeypatch.setitem(mlp.GATED_WAYS, mlp.GATED_BASE, mlp.GATED_WAYS["gated nn.ReLU"])
    monkeypatch.setattr("bench.sweep.in_new_process", lambda allocator, call, *arguments: call(*arguments))


WAYS = ["nn.ReLU", "ReLU in the epilogue", *(way for way in mlp.WAYS if "QReLU" in way and "compiled" not in way)]


def test_rows_and_what_is_kept(small, tmp_path, capsys):
    out = tmp_path / "mlp.csv"
    mlp.main(["--shapes", SHAPE, "--rounds", "5", "--only", *WAYS, "--out", str(out)])
    rows = {row["way"]: row for row in csv.DictReader(out.open())}
    assert set(rows) == {mlp.BASE, *WAYS}
    elements = 16 * 64
    kept = {way: int(row["kept_bytes"]) for way, row in rows.items()}
    assert kept["nn.ReLU"] == kept["ReLU in the epilogue"] == 2 * elements
    assert kept["QReLUMLP, 4 bits"] == kept["QReLUMLP, 4 bits, squared"] == elements // 2
    assert kept["QReLUMLP, 4 bits, clipped_relu"] == elements * 5 // 8
    assert all(row["peak_bytes"] == "" and float(row["speed_over_relu"]) > 0 for row in rows.values())


def test_gated_rows_and_the_page(small, tmp_path):
    out = tmp_path / "mlp-cuda.csv"
    mlp.main(["--shapes", SHAPE, GATED, "--rounds", "5", "--only", "nn.ReLU", *mlp.GATED_WAYS, "--out", str(out)])
    rows = {row["way"]: row for row in csv.DictReader(out.open())}
    assert set(rows) == {"nn.ReLU", mlp.BASE, *mlp.GATED_WAYS}
    assert [row["shape"] for row in rows.values()] == 2 * [SHAPE] + len(mlp.GATED_WAYS) * [GATED]
    elements = 2 * 16 * 64
    kept = {way: int(row["kept_bytes"]) for way, row in rows.items()}
    assert kept["QReLUGatedMLP, 4 bits"] == elements // 2
    assert kept["QReLUGatedMLP, 4 bits, clipped_relu"] == elements * 5 // 8
    assert kept["gated nn.ReLU"] == 2 * elements * 3 // 2  # both ReLUs and their product
    assert float(rows[mlp.GATED_BASE]["speed_over_relu"]) == 1
    report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page-cuda.md").read_text()
    time = f"{1e3 * float(rows[mlp.BASE]['seconds_median']):.3f}"
    assert f"| {SHAPE} | {mlp.BASE} | {time} | 1 | 0.0 |  |" in page
    for way in mlp.GATED_WAYS:
        assert page.count(f"| {GATED} | {way} |") == 1


def test_a_wrong_way_is_seen(small, monkeypatch):
    monkeypatch.setitem(
        mlp.WAYS, "nn.ReLU", lambda first, layer: torch.nn.Sequential(first, torch.nn.Identity(), layer)
    )
    with pytest.raises(BenchError, match=r"nn\.ReLU differs from float32"):
        mlp._Job("nn.ReLU", (16, 32, 64, 24), "cpu")


def test_nothing_of_a_cpu_is_published(small, monkeypatch, capsys):
    monkeypatch.setattr("bench.sweep.write_csv", lambda *_: pytest.fail("published"))
    mlp.main(["--shapes", SHAPE, "--rounds", "5", "--only", "nn.ReLU"])
    for wrong in (
        ["--only", "nn.GELU"],
        ["--rounds", "2"],
        ["--only", "nn.ReLU", "--shapes", GATED],
        ["--device", "cuda"] if not torch.cuda.is_available() else [],
    ):
        if wrong:
            with pytest.raises(SystemExit):
                mlp.main(wrong)


def test_what_needs_a_gpu_is_left_out(small, capsys):
    mlp.main(["--shapes", SHAPE, "--rounds", "5", "--only", mlp._SQUARE])
    assert mlp._SQUARE not in capsys.readouterr().out
