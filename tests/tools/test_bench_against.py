"""bench.kernels --against: two builds in turns, each in a process of its own."""

from __future__ import annotations

import csv
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from bench import against, kernels, sweep

import coarsegrad as cg
from coarsegrad import _ops

pytestmark = pytest.mark.usefixtures("measured_here")
PACKAGE = Path(cg.__file__).parent
ONLY = ["--sizes", "2^14", "--dtypes", "float32", "--rounds", "5", "--only"]
NATIVE = pytest.mark.skipif(_ops.native is None, reason=f"native library not in use: {_ops.native_why_not}")


@pytest.fixture
def checkout(tmp_path):
    """Another checkout: links to the files of this one."""
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            link = tmp_path / "python" / "coarsegrad" / path.relative_to(PACKAGE)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, link)
    return tmp_path


def change(checkout, name, text):
    """Puts a file in the place of a link."""
    path = checkout / "python" / "coarsegrad" / name
    path.unlink()
    path.write_text(text)


@NATIVE
def test_rows_of_what_both_have(checkout, tmp_path, capsys):
    """The other cannot run one of them, which is said."""
    without = """
def _absent(*_):
    raise NotImplementedError("not yet")

_library.impl("qrelu_backward_from_codes", _absent, "CPU")
"""
    change(checkout, "_ops.py", (PACKAGE / "_ops.py").read_text() + without)
    out = tmp_path / "against.csv"
    names = ["forward, 2 bits", "backward, reverse_exponential_step"]
    kernels.main(["--against", str(checkout), "--out", str(out), *ONLY, *names])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == [*kernels.COPIES, "forward, 2 bits"]
    for row in rows:
        assert float(row["seconds_median"]) > 0 and float(row["other_seconds_median"]) > 0
        for name in ("other", "itself"):
            low, middle, high = (float(row[f"time_over_{name}{q}"]) for q in ("_q20", "", "_q80"))
            assert 0 < low <= middle <= high
    assert {row["rounds"] for row in rows} == {"5"} and rows[0]["other_backend"] == rows[0]["backend"]
    shown = capsys.readouterr().out
    assert f"Skipped, not in {checkout}: backward, reverse_exponential_step (NotImplementedError: not yet)" in shown
    assert re.search(rf"(Slower|Nothing is slower) than in {re.escape(str(checkout))}", shown)
    assert f"Written: {out}" in shown and "bench.report" not in shown


@NATIVE
def test_a_library_for_another_torch(checkout):
    facts = (PACKAGE / "_build.py").read_text()
    change(checkout, "_build.py", re.sub("TORCH_VERSION = .*", 'TORCH_VERSION = "2.1.0"', facts))
    with pytest.raises(SystemExit, match=r"has no native library that runs: .*built for torch 2\.1\.0"):
        kernels.main(["--against", str(checkout), *ONLY, "forward, 2 bits"])


def test_a_package_that_the_benchmark_does_not_fit(checkout):
    change(checkout, "_types.py", "")
    part = sweep.Part("cpu", "keep", (("float32", 2**14),), ("forward, 2 bits",), 5, 1)
    with pytest.raises(against.BenchError, match="does not run this benchmark: ImportError: cannot import name"):
        against.Build(checkout / "python", "bench.kernels", part)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--against", "no/such/folder"], "no/such/folder is no checkout, it has no python/coarsegrad"),
        (["--against", "{checkout}", "--threads", "2"], "compares one thread of a CPU"),
    ],
)
def test_what_cannot_be_compared(checkout, capsys, arguments, message):
    with pytest.raises(SystemExit):
        kernels.main([argument.format(checkout=checkout) for argument in arguments])
    assert message in capsys.readouterr().err


def test_nothing_is_written_unless_asked(checkout, monkeypatch):
    row = {"dtype": "float32", "size": 4, "kernel": "copy of x", "time_over_other": "1", "time_over_itself": "1"}
    written = []
    monkeypatch.setattr(against, "run_parts", lambda program, sweep, parts, out, then: written.append(out) or [row])
    kernels.main(["--against", str(checkout)])
    kernels.main(["--against", str(checkout), "--out", "a.csv"])
    assert written == [None, Path("a.csv")]


@pytest.fixture
def turns():
    made = against._Turns("bench.kernels")
    made.begin({"device": "cpu", "allocator": "keep", "inputs": [["float32", 2**14]],
                "names": ["forward, 2 bits", "forward, 4 bits"], "rounds": 5, "threads": 1})  # fmt: skip
    return made


def test_kernels_that_only_the_reference_has_are_lacking(turns, monkeypatch):
    def slow(tensors):
        warnings.warn("on cpu coarsegrad runs on its plain-torch reference", stacklevel=1)

    monkeypatch.setitem(kernels.KERNELS, "forward, 4 bits", replace(kernels.KERNELS["forward, 4 bits"], call=slow))
    assert turns.lacking() == {"forward, 4 bits": "UserWarning: on cpu coarsegrad runs on its plain-torch reference"}


@pytest.mark.parametrize("asked", [("lacking",), ("prepare", ["forward, 2 bits"], "float32", 2**14)])
def test_wrong_results_are_no_report(turns, monkeypatch, asked):
    right = kernels.KERNELS["forward, 2 bits"].call
    calls = []

    def wrong(tensors):
        calls.append(None)
        return tuple(t + 1 for t in right(tensors)) if len(calls) == 1 else right(tensors)

    monkeypatch.setitem(kernels.KERNELS, "forward, 2 bits", replace(kernels.KERNELS["forward, 2 bits"], call=wrong))
    with pytest.raises(against.BenchError, match="differs from the reference"):
        getattr(turns, asked[0])(*asked[1:])


def test_the_verdict():
    row = {"dtype": "float32", "size": 2**22, "kernel": "forward, 2 bits", "time_over_itself": "0.992"}
    rows = [{**row, "time_over_other": ratio} for ratio in ("1.02", "1.021", "0.5")]
    assert against.verdict(rows, Path("there")).splitlines() == [
        "Slower than in there by more than 2%:",
        "  float32, 2^22, forward, 2 bits: 1.021 (itself 0.992)",
        "The same build in two processes differs by up to 0.8%.",
    ]
    assert against.verdict(rows[:1], Path("there")).startswith("Nothing is slower than in there by more than 2%.\n")
