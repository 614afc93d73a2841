"""bench.kernels, bench.peers and bench.report: they check before they time, and the page follows from the CSV files."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from bench import activations, autograd, inference, kernels, layers, memory, peers, report, sweep, timing, training
from bench.promises import PROMISES, Promise
from paths import ROOT

import coarsegrad as cg
from coarsegrad import _ops

pytestmark = pytest.mark.usefixtures("measured_here")
# The peers' packages are not always installed, and torch.compile takes long.
OURS = ["qrelu", "qrelu_inplace", "qrelu_learned", "eager", "fake_quantize", "learnable"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def in_order(row, name):
    return float(row[f"{name}_q20"]) <= float(row[f"{name}_q80"])


def test_kernels_rows(tmp_path, capsys):
    out = tmp_path / "kernels.csv"
    kernels.main(["--sizes", "2^14", "1000", "--rounds", "5", "--out", str(out)])
    rows = rows_of(out)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    in_rows = {name for name in kernels.KERNELS if ", per " in name}
    assert len(in_rows) == 8
    for size, left_out in (("16384", set()), ("1000", in_rows)):
        names = [row["kernel"] for row in rows if row["size"] == size and row["dtype"] == "float32"]
        assert names == [*kernels.COPIES, *(name for name in kernels.KERNELS if name not in left_out)]
    assert all(in_order(row, "seconds") and in_order(row, "time_over_copy") for row in rows)
    assert {row["time_over_copy"] for row in rows if row["kernel"] in kernels.COPIES} == {"1"}
    moved = {(row["dtype"], row["kernel"]): float(row["bytes_per_element"]) for row in rows}
    assert moved["float32", "forward, 2 bits"] == 8 + 1 / 8
    assert moved["bfloat16", "backward, reverse_exponential"] == 6
    assert moved["bfloat16", "codes to levels, 2 bits"] == 2 + 2 / 8
    assert moved["bfloat16", "signed, 8 bits, per group"] == float(f"{4 + 2 / 128:g}")
    assert {(row["threads"], row["clock"], row["rounds"]) for row in rows} == {("1", "thread CPU time", "5")}
    shown = capsys.readouterr().out
    assert "2^14" in shown and "of copy" in shown and f"Written: {out}" in shown


@pytest.mark.parametrize("name", ["forward, 2 bits", "backward, reverse_exponential", "backward, learned step"])
def test_a_wrong_kernel_is_no_report(tmp_path, monkeypatch, name):
    right = kernels.KERNELS[name]
    which = 1 if right.sums else 0

    def wrong(tensors):
        results = list(right.call(tensors))
        if not on_reference:
            results[which] = results[which] * 1.01 if right.rtol or right.sums else results[which].roll(1)
        return tuple(results)

    on_reference = []
    use_backend = cg.use_backend

    def marked(backend):
        on_reference.append(backend)
        return use_backend(backend)

    monkeypatch.setattr(cg, "use_backend", marked)
    monkeypatch.setitem(kernels.KERNELS, name, replace(right, call=wrong))
    out = tmp_path / "kernels.csv"
    with pytest.raises(SystemExit, match="no times are reported"):
        kernels.main(["--sizes", "1000", "--only", name, "--rounds", "5", "--out", str(out)])
    assert on_reference and not out.exists()


def test_peers_rows(tmp_path, capsys):
    out = tmp_path / "peers.csv"
    peers.main(["--sizes", "4", "2^12", "--only", *OURS, "--rounds", "5", "--out", str(out)])
    rows = rows_of(out)
    cases = {(row["dtype"], row["size"], row["pass"]) for row in rows}
    assert len(cases) == 8
    for case in cases:
        mine = [row for row in rows if (row["dtype"], row["size"], row["pass"]) == case]
        assert [row["implementation"] for row in mine] == ["relu", *OURS]
        assert float(mine[0]["speed_over_relu"]) == 1
    assert all(in_order(row, "seconds") and in_order(row, "speed_over_relu") for row in rows)
    shown = capsys.readouterr().out
    assert "QReLU in place" in shown and f"Written: {out}" in shown


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    absent = replace(activations.IMPLEMENTATIONS["brevitas"], package="no_such_package")
    monkeypatch.setitem(activations.IMPLEMENTATIONS, "brevitas", absent)
    out = tmp_path / "peers.csv"
    peers.main(["--sizes", "4", "--dtypes", "float32", "--only", "brevitas", "--rounds", "5", "--out", str(out)])
    assert "Skipped, not installed: brevitas" in capsys.readouterr().out
    assert {row["implementation"] for row in rows_of(out)} == {"relu"}


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("eager", lambda: lambda x: cg.qrelu(x, 0.25, 2), "the output of eager differs from the reference in"),
        ("eager", lambda: lambda x: cg.qrelu(x, 0.5, 2, ste="relu"), "the gradient of eager differs"),
        ("fake_quantize", lambda: lambda x: cg.qrelu(x, 0.5, 2), "output of fake_quantize is not the nearest level in"),
        ("fake_quantize", lambda: lambda x: cg.qrelu(x, 0.5, 3), "output of fake_quantize is not the nearest level in"),
        ("eager", lambda: lambda x: x.no_such_method(), r"eager failed \(--only leaves it out\)"),
        ("eager", lambda: 1 / 0, r"eager failed \(--only leaves it out\): division by zero"),
    ],
)
def test_a_wrong_implementation_is_no_report(tmp_path, monkeypatch, name, make, message):
    monkeypatch.setitem(activations.IMPLEMENTATIONS, name, replace(activations.IMPLEMENTATIONS[name], make=make))
    out = tmp_path / "peers.csv"
    with pytest.raises(SystemExit, match=message):
        peers.main(["--sizes", "2^12", "--only", name, "--rounds", "5", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "2^29"], "a size must be 1 to 2\\^28 elements"),
        (["--sizes", "many"], "'many' is no number of elements"),
        (["--rounds", "4"], "at least 5"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch sees no CUDA device here")]),
    ],
)
@pytest.mark.parametrize("command", [kernels, peers])
def test_bad_options_are_refused(capsys, command, arguments, message):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 3, 128, 2**19 + 1, 2**22 + 77])  # the last past the caches
def test_the_copy_copies(monkeypatch, threads, size):
    torch.set_num_threads(threads)
    for native, dtype in product((_ops.native, None), sweep.DTYPES.values()):
        monkeypatch.setattr(_ops, "native", native)
        source, to = torch.randn(size).to(dtype), torch.zeros(size + 1, dtype=dtype)
        sweep.copying(to[:-1], source)()
        assert torch.equal(to[:-1], source) and to[-1] == 0


@pytest.mark.skipif(_ops.native is None, reason="the native library is unavailable")
def test_what_the_native_copy_refuses():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"to must have from's 64 bytes, got 60"):
        _ops.native.copy(torch.zeros(15), x)
    with pytest.raises(ValueError, match=r"from must be contiguous on a CPU, got torch\.\w+ with strides \[1, 4\]"):
        _ops.native.copy(x, x.t())
    with pytest.raises(ValueError, match="to must be contiguous on a CPU"):
        _ops.native.copy(x.to("meta"), x)


def test_the_timer_of_a_gpu(monkeypatch):
    """With a fake clock and queue: each call lies between two events, after a wait and a flush."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.time = 3.0 * sum(entry == "job" for entry in log)

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return end.time - self.time

    class Flush:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**10))
    for cold, calls in ((True, 5), (False, 1)):
        timer = timing.GpuTimer(torch.device("cpu"), cold)
        assert timer._flush.numel() == (2**28 if cold else 0)
        timer._flush = Flush()
        assert timer.calls(lambda: log.append("job")) == calls
        log.clear()
        assert timer.sample(lambda: log.append("job"), 2) == (pytest.approx(3e-3), 0.0)
        assert log == ["wait", *["flush", "event", "job", "event"] * 2, "synchronize"]


def test_verdicts():
    promise = Promise("claim", 1.1, lambda results: results["x"])
    assert [promise.verdict({"x": x}) for x in (None, 1.1, 1.101, 1.2101)] == [
        "not measured", "met", "missed by less than 1%", "missed by 10%"]  # fmt: skip


def test_promises_are_about_what_is_there():
    """Every promise finds its rows in the committed results."""
    results = report.load(report.RESULTS)
    assert all(promise.time(results) is not None for promise in PROMISES)
    assert len({promise.claim for promise in PROMISES}) == len(PROMISES)
    missed = [promise for promise in PROMISES if promise.verdict(results).startswith("missed")]
    assert all(promise.tried for promise in missed), [promise.claim for promise in missed if not promise.tried]


def test_the_page_is_that_of_the_committed_results():
    page = report.page(report.load(report.RESULTS))
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page
    for table, rows in report.load(report.RESULTS).items():
        assert all("dirty" not in row["git"] and row["git"] for row in rows), table


def test_report_from_a_folder(tmp_path, capsys):
    kernels.main(["--sizes", "2^14", "--rounds", "5", "--out", str(tmp_path / "kernels.csv")])
    peers.main(["--sizes", "4", "--only", "qrelu", "--rounds", "5", "--out", str(tmp_path / "peers.csv")])
    page = tmp_path / "page.md"
    report.main(["--results", str(tmp_path), "--page", str(page)])
    assert {path.name for path in tmp_path.glob("*.png")} == {"roofline.png", "peers.png"}
    text = page.read_text()
    assert "| forward, 2 bits |" in text and "| QReLU |" in text and "Whole training steps" not in text
    shown = capsys.readouterr().out
    assert "float32, 4: QReLU vs. nn.ReLU" in shown and "not measured" in shown


def test_report_of_a_gpu(tmp_path, capsys):
    """From results of a GPU: of a CPU here, under the names that a GPU's have."""
    for table in ("kernels", "peers", "memory"):
        rows = rows_of(report.RESULTS / f"{table}.csv")
        for row in rows:
            row |= {"device": "a GPU", "git": "0123456789abcdef"}
        sweep.write_csv(rows, sweep.of_gpu(tmp_path / f"{table}.csv"))
    report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    names = {"roofline-cuda.png", "peers-cuda.png", "memory-cuda.png", "page-cuda.md"}
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".csv"} == names
    text = (tmp_path / "page-cuda.md").read_text()
    assert "a GPU, native (avx2), torch" in text and "coarsegrad at 0123456789," in text
    assert "| QReLU in place |" in text and re.search(r"\| opt \| bfloat16 \| qrelu, packed \| \d", text)
    assert "promised" not in text


def test_report_without_results(tmp_path):
    with pytest.raises(SystemExit, match="has none of kernels.csv, peers.csv, training.csv, memory.csv"):
        report.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])


@pytest.mark.parametrize(
    "command, option", [(kernels, "--rounds"), (peers, "--rounds"), (layers, "--against"), (report, "--page")]
)
def test_help_helps(capsys, command, option):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, option",
    [
        (kernels, ["--only", "forward, 2 bits"]), (peers, ["--quick"]), (memory, ["--networks", "lenet"]),
        (training, ["--rounds", "5"]), (inference, ["--threads", "2"]), (layers, ["--only", "linear"]),
    ],
)  # fmt: skip
def test_a_part_replaces_no_published_results(command, option, tmp_path, monkeypatch, capsys):
    measured = {"pass": "", "mode": "", "activation": "", "seconds_median": "1", "time_over_relu_median": "1",
                "share_of_activation_median": "1", "seconds_to_compile": ""}  # fmt: skip
    results = tmp_path / "results.csv"
    monkeypatch.setattr(command, "RESULTS", results)
    for module in (sweep, command):
        monkeypatch.setattr(module, "in_new_process", lambda *_: [measured], raising=False)
    monkeypatch.setattr(command, "_rows", lambda *_: [measured], raising=False)
    command.main(option)
    shown = capsys.readouterr().out
    assert not results.exists() and f"Only printed: {option[0]} would replace" in shown and "Written" not in shown
    command.main([*option, "--out", str(tmp_path / "other.csv")])
    assert not results.exists() and (tmp_path / "other.csv").exists()
    command.main([])
    assert results.exists() and f"Written: {results}" in capsys.readouterr().out


def test_a_benchmark_is_a_command():
    command = [sys.executable, "-m", "bench.kernels", "--help"]
    assert "--rounds" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")
def test_autograd_times_the_derivative_in_both_languages(capsys):
    x, alpha = torch.ones(4, requires_grad=True), torch.tensor([0.5])
    nodes = [form(x, alpha).grad_fn.name() for form in autograd.forms().values()]
    assert nodes == ["QReluBackward", "QReluBackward", "_QReLUBackward", "ReluBackward0"]
    autograd.main(["--rounds", "2"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["4", "elements", "us", "20%", "to", "80%", "ratio"]
    assert [re.split("  +", row)[0] for row in rows] == list(autograd.forms())
    assert rows[0].endswith(" 1.00")


def test_autograd_without_the_native_library(capsys, monkeypatch):
    monkeypatch.setattr(_ops, "native", None)
    with pytest.raises(SystemExit):
        autograd.main([])
    assert "nothing to compare without the native library" in capsys.readouterr().err
