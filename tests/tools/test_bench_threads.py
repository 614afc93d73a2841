"""bench.threads: kernels take turns on one thread and on several, and the page follows from the CSV file."""

from __future__ import annotations

import csv
import pickle
import re
from dataclasses import replace

import pytest
import torch
from bench import kernels, report, threads, timing

pytestmark = pytest.mark.usefixtures("measured_here")
NAMES = ["forward, 2 bits", "backward, clipped_relu"]
SMALL = ["--sizes", "2^14", "--rounds", "5", "--only", *NAMES]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_their_page(tmp_path, capsys):
    out, page = tmp_path / "threads.csv", tmp_path / "page.md"
    threads.main([*SMALL, "--out", str(out)])
    rows = rows_of(out)
    cases = [(dtype, name) for dtype in ("float32", "bfloat16") for name in (*kernels.COPIES, *NAMES)]
    assert [(row["dtype"], row["kernel"]) for row in rows] == cases
    for row in rows:
        speed = float(row["one_thread_seconds_median"]) / float(row["seconds_median"])
        assert float(row["speed_over_one_thread"]) == pytest.approx(speed, rel=1e-3)
        assert 0 < float(row["speed_over_one_thread_q20"]) <= float(row["speed_over_one_thread_q80"])
    assert {(row["threads"], row["clock"], row["size"]) for row in rows} == {("2", "wall", "16384")}
    assert f"Written: {out}" in capsys.readouterr().out

    report.main(["--results", str(tmp_path), "--page", str(page)])
    table = page.read_text().split("## Several threads\n")[1]
    speed = float(rows[2]["speed_over_one_thread"])
    assert re.search(rf"^\| forward, 2 bits \| {re.escape(f'{speed:.3g}')} \| [\d.]+ \|$", table, re.MULTILINE)
    assert "| copy of x |" in table and "2 threads" in table


def test_a_speed_is_the_time_of_one_thread_over_that_of_several():
    one, several = (timing.Times(1, seconds, 5 * [0.0]) for seconds in (5 * [4.0], [1.0, 1.0, 2.0, 4.0, 4.0]))
    (row,) = threads._rows("float32", 8, "", {"forward on a core on 1": one, "forward on a core on 2": several})
    names = ("speed_over_one_thread_q20", "speed_over_one_thread", "speed_over_one_thread_q80")
    assert (row["kernel"], *(float(row[name]) for name in names)) == ("forward on a core", 1, 2, 4)


def test_it_runs_in_a_process_of_its_own():
    """The fixture measures in this one."""
    assert callable(pickle.loads(pickle.dumps(threads.SWEEP.measure)))


def test_each_turn_has_its_threads(monkeypatch):
    """Of both jobs of a kernel, and of the check before them."""
    seen = []
    right = kernels.KERNELS[NAMES[0]]

    def call(tensors):
        seen.append(torch.get_num_threads())
        return right.call(tensors)

    monkeypatch.setitem(kernels.KERNELS, NAMES[0], replace(right, call=call))
    part = threads.Part("cpu", "keep", (("float32", 2**14), ("float32", 2**12)), (NAMES[0],), 5, 3)
    for dtype, size in part.inputs:
        seen.clear()
        (case,) = threads._cases(part, dtype, size)
        assert set(seen) == {3}  # a reference is computed too
        for wanted in (1, 3):
            seen.clear()
            threads.SWEEP.timer(torch.device("cpu")).sample(case.jobs[f"{NAMES[0]} on {wanted}"], 2)
            assert seen == 3 * [wanted]


def test_a_wrong_kernel_is_no_report(tmp_path, monkeypatch):
    right = kernels.KERNELS[NAMES[0]]

    def wrong(tensors):
        y, *others = right.call(tensors)
        return (y.roll(1) if torch.get_num_threads() == 2 and y.shape == tensors["x"].shape else y, *others)

    rolled = replace(right, call=wrong)
    monkeypatch.setitem(kernels.KERNELS, NAMES[0], rolled)
    monkeypatch.setattr(
        kernels, "_check", lambda name, kernel, got, t, check=kernels._check: check(name, right, got, t)
    )
    out = tmp_path / "threads.csv"
    with pytest.raises(SystemExit, match="differs from the reference .* no times are reported"):
        threads.main([*SMALL, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threads", "1"], "at least 2, got '1'"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--rounds", "4"], "at least 5"),
        (["--sizes", "many"], "'many' is no number of elements"),
    ],
)
def test_bad_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        threads.main(arguments)
    assert message in capsys.readouterr().err


def test_a_part_replaces_no_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(threads, "RESULTS", tmp_path / "threads.csv")
    threads.main(SMALL)
    assert "Only printed: --only, --sizes, --rounds would replace" in capsys.readouterr().out
    assert not (tmp_path / "threads.csv").exists()


def test_more_threads_than_cores_are_said(monkeypatch, capsys):
    monkeypatch.setattr(threads, "available_cores", lambda: 1)
    threads.main(["--sizes", "2^12", "--dtypes", "float32", "--rounds", "5", "--only", NAMES[0]])
    assert "--threads 2: this process has 1 core, which the threads share" in capsys.readouterr().out
