"""`python -m coarsegrad finetune` in two processes of torchrun: what one process comes to, once, and again if resumed.

This file is also the script that torchrun runs.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from paths import TESTS
from small_finetune import BATCH, LENGTH, WIDTH, llama_folder, outcome, run, write_texts

from coarsegrad.experiments import finetune, language, processes
from coarsegrad.experiments.files import ExperimentError

pytestmark = pytest.mark.costly
WORLD, MODES = 2, ("ddp", "fsdp")
TRAINED = "All are trained.\n"
OPT = ["--bits", "4", "--steps", "4"]
WEIGHTS = ["--weight-bits", "8", "--head-bits", "8", "--rho", "0.01"]
LLAMA = ["--blocks", "--group", "16", "--bits", "4", "--steps", "2", "--model"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
finetune._TIMED_STEPS = 1


class Stopped(Exception):
    """Raised in a step of training."""


def stop_at(call, error):
    """Raise `error` in call number `call` of train_step, counted from here. Returns what undoes that."""
    original, calls = language.train_step, []

    def counted(*args):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(*args)

    language.train_step = counted
    return lambda: setattr(language, "train_step", original)


def joined_again(*arguments):
    """A run in a group of its own: as torchrun counts them, another attempt."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1)
    run(*arguments)


def in_each_process(folder, what):
    folders = [folder / name for name in ("pretrain", "finetune")]
    for mode in MODES:
        joined_again(folders, folder / f"opt-{mode}", *OPT, "--parallel", mode)
        undo = stop_at(10, Stopped())  # 6 are pretraining and then 4 float, with a checkpoint after two
        with pytest.raises((Stopped, SystemExit)):
            joined_again(folders, folder / f"resumed-{mode}", *OPT, "--parallel", mode)
        undo()
        dist.destroy_process_group()
        atexit.unregister(processes.exit_at_once)
        joined_again(folders, folder / f"resumed-{mode}", *OPT, "--parallel", mode)
        if what == "all":
            model = [*LLAMA, str(folder / "llama"), "--lora", "2"]
            joined_again(folders, folder / f"lora-{mode}", *model, "--parallel", mode)
        joined_again(folders, folder / f"weights-{mode}", *OPT, *WEIGHTS, "--parallel", mode)
    if os.environ["RANK"] == "0":
        print(TRAINED, end="", flush=True)
    else:  # fails, in the second step of fine-tuning
        stop_at(8, ExperimentError("no more paper"))
    joined_again(folders, folder / "failing", *OPT)


def launched(*command):
    """The finished process of torchrun, which runs `command`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    paths = os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])
    return subprocess.run(
        [*torchrun, *command], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts, a Llama, and the results of one process."""
    folder = tmp_path_factory.mktemp("torchrun")
    folders = [write_texts(folder / name, name) for name in ("pretrain", "finetune")]
    run(folders, folder / "opt-one", *OPT)
    run(folders, folder / "weights-one", *OPT, *WEIGHTS)
    llama = llama_folder(folder / "llama", folder / "opt-one")
    if importlib.util.find_spec("peft") is not None:
        run(folders, folder / "lora-one", *LLAMA, llama, "--lora", "2")
    return folder


@pytest.fixture(scope="module")
def process(folder):
    """Of all runs, the last of which fails: processes of its own would take as long to start as several runs."""
    what = "resumed" if importlib.util.find_spec("peft") is None else "all"
    process = launched(__file__, str(folder), what)
    assert TRAINED in process.stdout, process.stderr
    return process


@pytest.fixture(scope="module")
def printed(process):
    return process.stdout.partition(TRAINED)[0]


def checkpoint(out, name):
    return torch.load(out / "checkpoints" / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["opt", "weights", pytest.param("lora", marks=needs_peft)])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_one_process(folder, printed, kind, mode):
    one, both = (outcome(folder / f"{kind}-{name}") for name in ("one", mode))
    assert both["config"] == {**one["config"], "parallel": mode, "processes": WORLD}
    assert list(both["runs"]) == ["float", "4bit"]
    for name, run_of_one in one["runs"].items():
        result = both["runs"][name]
        for losses in ("loss", "validation_loss"):
            want, got = ([row[losses] for row in r["history"] if row[losses]] for r in (run_of_one, result))
            assert got == pytest.approx(want, rel=2e-4)
        for layer, want in run_of_one["layers"].items() if "layers" in run_of_one else ():
            got = result["layers"][layer]
            assert got["alpha_calibrated"] == pytest.approx(want["alpha_calibrated"], rel=1e-6)
            assert got["alpha"] == pytest.approx(want["alpha"], rel=1e-2) and got["alpha"] != got["alpha_calibrated"]
            assert got["elements"] == want["elements"] // WORLD == BATCH // WORLD * LENGTH * 4 * WIDTH
        # A process keeps what half of the batch needs, and what does not depend on the batch.
        assert 0.45 < result["kept_bytes"] / run_of_one["kept_bytes"] < 0.8
        trained, want = (checkpoint(folder / f"{kind}-{which}", name)["model"] for which in (mode, "one"))
        assert list(trained) == list(want)
        for key, value in want.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-2, atol=2e-3)
    assert both["runs"]["4bit"]["kept_bytes"] < both["runs"]["float"]["kept_bytes"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_gives_the_same_bits(folder, printed, mode):
    whole, resumed = folder / f"opt-{mode}", folder / f"resumed-{mode}"
    assert outcome(whole) == outcome(resumed)
    for name in ("pretraining", "float", "4bit"):
        one, other = (checkpoint(out, name) for out in (whole, resumed))
        assert one["config"] == other["config"] and one["config"]["processes"] == WORLD
        for part in ("model", "optimizer", "scheduler"):
            torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_one_process_prints_and_writes(folder, printed):
    runs = len(MODES) * (4 if "lora" in "".join(os.listdir(folder)) else 3)
    assert printed.count("4bit 0/") == printed.count("ppl after, relative to") == runs
    assert printed.count("float 0/") == runs
    assert "step in each of 2 processes (fsdp) on 2 x 16 tokens" in " ".join(printed.split())
    for mode in MODES:
        files = [
            sorted(str(path.relative_to(out)) for path in out.rglob("*"))
            for out in (folder / "opt-one", folder / f"opt-{mode}")
        ]
        assert files[0] == files[1]


def test_another_number_of_processes_is_refused(folder, printed):
    with pytest.raises(SystemExit, match="parallel: 'ddp' there, None now; processes: 2 there, None now"):
        run([folder / name for name in ("pretrain", "finetune")], folder / "opt-ddp", *OPT)


def test_an_error_in_one_process_ends_all_and_is_shown_once(folder, process):
    assert process.returncode != 0
    assert process.stderr.count("coarsegrad finetune: no more paper") == 1
    assert "RuntimeError" not in process.stderr and "DistBackendError" not in process.stderr
    assert "float 0/4" in process.stdout.partition(TRAINED)[2] and not (folder / "failing" / "results.json").exists()


def test_an_error_in_all_processes_is_shown_once(folder, tmp_path):
    process = launched("-m", "coarsegrad", "finetune", "--batch-size", "3", "--out", str(tmp_path / "out"))
    assert process.returncode != 0
    assert process.stderr.count("--batch-size must be a multiple of the 2 processes, got 3") == 1
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]), sys.argv[2])
