"""`python -m bench.memory` on a small network, and the figures that docs/memory.md takes from its results."""

from __future__ import annotations

import csv
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import figures, memory, networks
from bench.timing import BenchError, in_new_process
from paths import ROOT
from torch import nn

import coarsegrad as cg

DOCS = ROOT / "docs"
COLUMNS = ("kept_bytes", "peak_bytes")
# float32 of 64 x 32 twice, behind each of two activations, and what else the last Linear and the loss keep.
COUNT, ACTIVATIONS = 64 * 32, 2


def small_mlp(activation, dropout):
    hidden = [part for _ in range(ACTIVATIONS) for part in (nn.Linear(32, 32), activation())]
    return nn.Sequential(*hidden, nn.Linear(32, 10))


@pytest.fixture
def small(monkeypatch):
    """One small network, in this process, and of the peers one that is not installed."""
    plan = networks.ReluNetwork(small_mlp, lambda: torch.randn(64, 32))
    for module in (memory, networks):
        monkeypatch.setattr(module, "NETWORKS", {"mlp": plan})
    monkeypatch.setattr(networks, "_PEERS", {"brevitas": "no_such_package", "relu, torchao": "no_such_package"})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
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
    names = ["relu", "relu, checkpoint", "relu, fake_quantize", "qrelu", "qrelu, packed", "relu, compiled"]
    names += ["qrelu, compiled", "qrelu, packed, compiled"]
    assert [(row["dtype"], row["activation"]) for row in rows] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in names
    ]
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        kept = {row["activation"]: row["kept_bytes"] for row in rows if row["dtype"] == dtype}
        assert kept["relu, checkpoint"] == ""
        assert int(kept["qrelu"]) == ACTIVATIONS * (COUNT * item + COUNT // 8)
        for mode in ("", ", compiled"):
            assert int(kept["qrelu, packed" + mode]) == ACTIVATIONS * (COUNT * 2 // 8 + 4)  # codes, and alpha
            assert int(kept["relu" + mode]) == ACTIVATIONS * COUNT * item
    assert all(row["threads"] == "1" and int(row["peak_bytes"]) >= 0 for row in rows)
    assert {float(row["time_over_first_median"]) for row in rows if row["activation"] == "relu"} == {1.0}
    figure = figures.memory_figure(rows)
    assert len(figure.axes) == 4


def test_on_a_gpu(small, tmp_path, monkeypatch):
    """All of it but the GPU, for which the CPU stands in."""
    eager = {name: make for name, make in networks._ACTIVATIONS.items() if "compiled" not in name}
    monkeypatch.setattr(networks, "_ACTIVATIONS", eager)
    set_up, measured = networks.set_up, memory.facts
    monkeypatch.setattr(memory, "GPU_NETWORKS", memory.NETWORKS)
    monkeypatch.setattr(memory, "set_up", lambda network, variant, dtype, _: set_up(network, variant, dtype))
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
    with pytest.raises(SystemExit, match="packing changes a gradient of mlp, qrelu, packed, in bfloat16; nothing"):
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


def results_of(network):
    """(MiB of a column, to one decimal; seconds of a step), as functions of the variant."""
    rows = {row["activation"]: row for row in rows_of(memory.RESULTS) if row["network"] == network}

    def mebibytes(name, column):
        return f"{int(rows[name][column]) / 2**20:,.1f}" if rows[name][column] else "hidden"

    return rows, mebibytes, lambda name: float(rows[name]["seconds_median"])


def table_of_activations():
    for network in networks.RELU_NETWORKS:
        _, mebibytes, seconds = results_of(network)
        for mode in ("", ", compiled"):
            names = [f"{name}{mode}" for name in ("relu", "qrelu", "qrelu, packed")]
            saved, peak = (" / ".join(mebibytes(name, column) for name in names) for column in COLUMNS)
            times = " / ".join(f"{seconds(name) / seconds(names[0]):.3f}" for name in names[1:])
            yield f"| {network}{mode} | {saved} | {peak} | {times} |"


def table_of_blocks():
    rows, mebibytes, seconds = results_of("smollm2")
    for name in rows:
        saved, peak = (mebibytes(name, column) for column in COLUMNS)
        yield f"| {name} | {saved} | {peak} | {seconds(name):.2f} | {seconds(name) / seconds('silu'):.3f} |"


@pytest.mark.parametrize(
    "page, first_cell, table",
    [
        ("memory.md", "mlp|lenet|opt|t5", table_of_activations),
        ("blocks.md", "silu|[48] bits", table_of_blocks),
    ],
)
def test_the_tables_of_the_docs_are_the_committed_results(page, first_cell, table):
    found = re.findall(rf"^\| (?:{first_cell})\b.*$", (DOCS / page).read_text(), flags=re.MULTILINE)
    assert found == list(table())


def test_the_figure_of_the_docs_is_there():
    path = "../bench/results/memory.png"
    assert (DOCS / path).exists() and f"({path})" in (DOCS / "memory.md").read_text()


def test_a_llama_with_staircases_saves_less():
    """The network smollm2, with one layer and few tokens."""
    plan = networks.Llama(1, lambda: torch.randint(64, (2, 32)), vocabulary=64)
    saved = {}
    for name in plan.variants("cpu"):
        torch.manual_seed(0)
        model, forward = plan.build(name)
        if "packed" in name:
            cg.pack_activations_(model)
        saved[name] = memory._saved(forward, plan.input())
    kinds = ("8 bits, coarse", "8 bits, exact", "4 bits, coarse")
    coarse, exact, four = (saved[f"{kind} norms, packed"] for kind in kinds)
    assert saved["silu, checkpoint"] is None and four < coarse < exact < saved["silu"]
    assert coarse < saved["8 bits, coarse norms"]


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
