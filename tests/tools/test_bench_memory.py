"""`python -m bench.memory` on a small network, and the figures that docs/memory.md takes from its results."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import figures, memory
from bench.timing import BenchError, in_new_process
from paths import ROOT
from torch import nn

import coarsegrad as cg

DOCS = ROOT / "docs" / "memory.md"
# float32 of 64 x 32 twice, behind each of two activations, and what else the last Linear and the loss keep.
COUNT, ACTIVATIONS = 64 * 32, 2


def small_mlp(activation, dropout):
    hidden = [part for _ in range(ACTIVATIONS) for part in (nn.Linear(32, 32), activation())]
    return nn.Sequential(*hidden, nn.Linear(32, 10))


@pytest.fixture
def small(monkeypatch):
    """One small network, in this process, and of the peers one that is not installed."""
    monkeypatch.setattr(memory, "NETWORKS", {"mlp": memory.Network(small_mlp, lambda: torch.randn(64, 32))})
    monkeypatch.setattr(memory, "_PEERS", {"relu, no_such_package": None})
    monkeypatch.setattr(memory, "in_new_process", lambda allocator, function, *arguments: function(*arguments))
    threads = torch.get_num_threads()  # the tests' own process
    yield
    torch.set_num_threads(threads)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_and_the_csv(small, tmp_path, capsys):
    out = tmp_path / "memory.csv"
    memory.main(["--dtypes", "float32", "bfloat16", "--rounds", "2", "--threads", "1", "--out", str(out)])
    shown, rows = capsys.readouterr().out, rows_of(out)
    assert "Skipped, not installed: no_such_package" in shown
    names = ["relu", "relu, checkpoint", "relu, fake_quantize", "qrelu", "qrelu, packed"]
    assert [(row["dtype"], row["activation"]) for row in rows] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in names
    ]
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        kept = {row["activation"]: row["kept_bytes"] for row in rows if row["dtype"] == dtype}
        assert kept["relu, checkpoint"] == ""
        assert int(kept["relu"]) == ACTIVATIONS * COUNT * item
        assert int(kept["qrelu"]) == ACTIVATIONS * (COUNT * item + COUNT // 8)
        assert int(kept["qrelu, packed"]) == ACTIVATIONS * (COUNT * 2 // 8 + 4)  # codes, and alpha
    assert all(row["threads"] == "1" and int(row["peak_bytes"]) >= 0 for row in rows)
    assert {float(row["time_over_qrelu_median"]) for row in rows if row["activation"] == "qrelu"} == {1.0}
    figure = figures.memory_figure(rows)
    assert len(figure.axes) == 4


def test_on_a_gpu(small, tmp_path, monkeypatch):
    """All of it but the GPU, for which the CPU stands in."""
    set_up, measured = memory._set_up, memory.facts
    monkeypatch.setattr(memory, "GPU_NETWORKS", memory.NETWORKS)
    monkeypatch.setattr(memory, "_set_up", lambda network, activation, dtype, _: set_up(network, activation, dtype))
    monkeypatch.setattr(memory, "facts", lambda device, allocator: measured(torch.device("cpu"), allocator))
    monkeypatch.setattr(memory, "GpuTimer", lambda device, cold: memory.CpuTimer())
    allocated = iter(range(100))
    for name, stand_in in {
        "is_available": lambda: True, "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(allocated), "max_memory_allocated": lambda: 1000 + next(allocated),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    out = tmp_path / "memory.csv"
    memory.main(["--device", "cuda", "--networks", "mlp", "--rounds", "2", "--out", str(out)])
    rows = {row["activation"]: row for row in rows_of(out)}
    assert {row["peak_bytes"] for row in rows.values()} == {"1001"}
    assert int(rows["qrelu, packed"]["kept_bytes"]) == ACTIVATIONS * (COUNT * 2 // 8 + 4)
    assert rows["relu, checkpoint"]["kept_bytes"] == ""
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(SystemExit):
        memory.main(["--networks", "OPT-125M"])


def test_a_changed_gradient_is_no_report(small, tmp_path, monkeypatch):
    pack = cg.pack_activations_

    def pack_wrongly(model):
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
        return pack(model)

    monkeypatch.setattr(cg, "pack_activations_", pack_wrongly)
    out = tmp_path / "memory.csv"
    with pytest.raises(SystemExit, match="packing changes a gradient of mlp in bfloat16; nothing is reported"):
        memory.main(["--dtypes", "bfloat16", "--rounds", "2", "--threads", "1", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("multiplied", [True, False])
def test_the_dtype_is_one_that_the_cpu_multiplies(small, tmp_path, monkeypatch, capsys, multiplied):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplied)
    out = tmp_path / "memory.csv"
    memory.main(["--rounds", "2", "--threads", "1", "--out", str(out)])
    assert {row["dtype"] for row in rows_of(out)} == {"bfloat16" if multiplied else "float32"}
    assert ("--dtypes bfloat16" in capsys.readouterr().out) is not multiplied


def test_a_system_without_proc_is_told(monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda name: Path("no_such_folder"))
    with pytest.raises(BenchError, match="/proc/self/status"):
        memory._resident("VmRSS")


def test_the_committed_bytes_are_those_of_a_process_of_its_own():
    """The bytes kept depend on nothing but the code."""
    committed = {(row["network"], row["activation"]): row["kept_bytes"] for row in rows_of(memory.RESULTS)}
    peak, kept = in_new_process("return", memory._peak, "lenet", "qrelu, packed", "bfloat16", 1)
    assert peak > 0 and kept == int(committed["lenet", "qrelu, packed"])


def figures_of_docs():
    """The table of docs/memory.md as it follows from the results."""
    rows = {(row["network"], row["activation"]): row for row in rows_of(memory.RESULTS)}

    def bytes_of(network, activation, column):
        return f"{int(rows[network, activation][column]) / 2**20:.1f}"

    for network in memory.NETWORKS:
        names = ("relu", "qrelu", "qrelu, packed")
        kept, peak = ([bytes_of(network, name, column) for name in names] for column in ("kept_bytes", "peak_bytes"))
        time = [f"{float(rows[network, name]['time_over_qrelu_median']):.3f}" for name in ("relu", "qrelu, packed")]
        yield f"| {network} | {' / '.join(kept)} | {' / '.join(peak)} | {' / '.join(time)} |"


def test_the_figures_of_the_docs_are_the_committed_ones():
    text = DOCS.read_text()
    table = re.findall(r"^\| (?:mlp|lenet|opt|t5) \|.*$", text, flags=re.MULTILINE)
    assert table == list(figures_of_docs())
    assert (DOCS.parent / "../bench/results/memory.png").exists() and "(../bench/results/memory.png)" in text


def test_the_measuring_process_ends_with_the_one_that_waits_for_it(tmp_path):
    """However that ends: killed, it cannot stop anything."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from bench.timing import in_new_process\n"
        "def measure():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    in_new_process('default', measure)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    waiting = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    measuring = int(waiting.stdout.readline())
    waiting.kill()
    try:
        # It holds the other end of this pipe, which is read until that is closed.
        assert waiting.communicate(timeout=300)[0] == ""
    except subprocess.TimeoutExpired:
        os.kill(measuring, signal.SIGKILL)
        raise
