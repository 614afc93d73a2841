"""`python -m coarsegrad mnist`: resuming to the same bits, and what it leaves behind. On small IDX files."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys

import pytest
import torch
from interruptions import count_calls
from small_mnist import BATCH, TRAIN, write_idx_folder
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments import integers, mnist, training
from coarsegrad.experiments.arguments import usable_device
from coarsegrad.experiments.files import replacing
from coarsegrad.experiments.models import lenet5, quantized

OPTIONS = ["--batch-size", str(BATCH), "--threads", "1", "--float-epochs", "2", "--epochs", "3"]
VARIANT = "2bit-clipped_relu-nearest"


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx"))


@pytest.fixture(autouse=True)
def small_and_contained(monkeypatch, tmp_path):
    """Short timing and an empty cache."""
    monkeypatch.setattr(mnist, "_TIMED_STEPS", 2)
    monkeypatch.setenv("COARSEGRAD_CACHE", str(tmp_path / "cache"))


def run(folder, out, *options):
    parser = argparse.ArgumentParser()
    mnist.add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        mnist.main(parser.parse_args(["--data", str(folder), "--out", str(out), *OPTIONS, *options]))
    finally:
        torch.set_num_threads(threads)


def outcome(out, variant=VARIANT):
    """What must not depend on interruptions: both final states and histories, without the times."""
    states, histories = {}, []
    for path in (out / "float.pt", out / variant / "checkpoint.pt"):
        saved = torch.load(path, weights_only=True)
        states |= {f"{path.name} {name}": value for name, value in saved["model"].items()}
        histories.append([{k: v for k, v in row.items() if k != "seconds"} for row in saved["history"]])
    return states, histories


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


@pytest.fixture(scope="module")
def uninterrupted(idx_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(idx_folder, out)
    return out


def test_end_products(uninterrupted, capsys, idx_folder):
    run(idx_folder, uninterrupted)  # finished already: measures and reports again
    printed = capsys.readouterr().out
    assert "quantized 1/3" not in printed
    for row in ("test accuracy", "saved for backward, activations", "peak of a", "training step, median", "backend"):
        assert row in printed
    folder = uninterrupted / VARIANT
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "curves.png", "results.json"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    report = json.loads((folder / "results.json").read_text())
    assert report["config"]["bits"] == 2 and report["config"]["seed"] == 0
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["threads"] == 1
    assert [len(report["history"][phase]) for phase in ("float", "quantized")] == [2, 3]
    results = report["results"]
    elements = [BATCH * 20 * 24 * 24, BATCH * 50 * 8 * 8, BATCH * 500]
    assert results["float"]["kept_bytes_activations"] == 4 * sum(elements)
    # Packed: 2 bits of code and one of the gate an element, and alpha.
    low = sum((2 * n + 7) // 8 + (n + 7) // 8 + 4 for n in elements)
    assert results["quantized"]["kept_bytes_activations"] == low
    assert results["float"]["kept_bytes_network"] > results["float"]["kept_bytes_activations"]
    for phase in ("float", "quantized"):
        assert results[phase]["peak_bytes"] > 4 * elements[0]
        assert results[phase]["step_seconds"] > 0
        assert results[phase]["test_accuracy"] == report["history"][phase][-1]["test_accuracy"]
    assert results["quantized"]["alpha"]["act1"] == pytest.approx([0.6508], abs=1e-4)


def test_it_learns(idx_folder, tmp_path):
    run(idx_folder, tmp_path, "--float-epochs", "8", "--epochs", "4", "--lr", "0.02")
    for history in outcome(tmp_path)[1]:
        assert history[-1]["test_accuracy"] >= 0.9


# Calls 1..6 are float steps (3 a batch epoch), 7..15 quantized ones.
@pytest.mark.parametrize("call", [1, 5, 7, 8, 14])
def test_ctrl_c_and_resume_give_the_same_bits(idx_folder, tmp_path, uninterrupted, monkeypatch, capsys, call):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        count_calls(patch, training, "train_step", stop_at=(call,))
        run(idx_folder, tmp_path)
    assert ended.value.code == 130
    assert "the same command to continue" in capsys.readouterr().out
    assert (tmp_path / "float.pt").exists() == (call > 3)
    torch.manual_seed(99)  # nothing hangs on the generator's state
    run(idx_folder, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


# The command, killed while it writes over its checkpoint for the first time.
KILLED = """
import os, pathlib, signal
import torch
from coarsegrad.__main__ import main
save = torch.save
def save_and_die(state, file):
    save(state, file)
    if pathlib.Path(file.name).with_name("checkpoint.pt").exists():
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_and_die
main()
"""


def test_kill_and_resume_give_the_same_bits(idx_folder, tmp_path):
    options = ["--learn-alpha", "exact"]
    variant = f"{VARIANT}-exact_alpha"
    command = [sys.executable, "-c", KILLED, "mnist", "--data", str(idx_folder), "--out", str(tmp_path / "killed")]
    done = subprocess.run([*command, *OPTIONS, *options], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(torch.load(tmp_path / "killed" / variant / "checkpoint.pt", weights_only=True)["history"]) == 1

    run(idx_folder, tmp_path / "killed", *options)
    run(idx_folder, tmp_path / "whole", *options)
    assert_same(outcome(tmp_path / "killed", variant), outcome(tmp_path / "whole", variant))
    states = outcome(tmp_path / "whole", variant)[0]
    start = cg.QReLU(2).alpha
    assert all(states[f"checkpoint.pt act{i}.alpha"] != start for i in (1, 2, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", "0.1"], "lr: 0.05 there, 0.1 now"),
        (["--epochs", "4"], "epochs: 3 there, 4 now"),
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["--subset", "32"], "subset: None there, 32 now"),
    ],
)
def test_another_configuration_is_refused(uninterrupted, idx_folder, options, message):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        run(idx_folder, uninterrupted, *options)
    assert before == {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}


def test_float_phase_is_shared_by_variants(uninterrupted, idx_folder, tmp_path, capsys):
    (tmp_path / "float.pt").write_bytes((uninterrupted / "float.pt").read_bytes())
    run(idx_folder, tmp_path, "--bits", "4", "--ste", "reverse_exponential", "--epochs", "1")
    printed = capsys.readouterr().out
    assert "quantized 1/1" in printed and "float 1/2" not in printed
    assert (tmp_path / "4bit-reverse_exponential-nearest" / "results.json").exists()


def test_damaged_checkpoint_is_refused(uninterrupted, idx_folder, tmp_path):
    whole = (uninterrupted / "float.pt").read_bytes()
    (tmp_path / "float.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="float.pt is not a readable checkpoint.*remove"):
        run(idx_folder, tmp_path)


def test_diverged_training_is_stopped(idx_folder, tmp_path):
    with pytest.raises(SystemExit, match="training diverged; try a lower --lr"):
        run(idx_folder, tmp_path, "--lr", "1e30")
    assert not (tmp_path / "float.pt").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--subset", "1000"], f"--subset 1000 is more than the {TRAIN} training images"),
        (["--subset", "8"], f"--batch-size {BATCH} is more than the 8 training images"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--data", "/nowhere"], "--data /nowhere is not a folder"),
    ],
)
def test_bad_options_are_named(idx_folder, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        run(idx_folder, tmp_path, *options)


@pytest.mark.parametrize(
    "options",
    [["--epochs", "0"], ["--lr", "nan"], ["--bits", "9"], ["--ste", "tanh"], ["--learn-alpha", "best"]],
)
def test_options_out_of_range(idx_folder, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as ended:
        run(idx_folder, tmp_path, *options)
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err


@pytest.mark.parametrize("weight_bits", (8, 2))
def test_convert(idx_folder, tmp_path, capsys, weight_bits):
    run(idx_folder, tmp_path, "--epochs", "1", "--convert", str(weight_bits))
    results = json.loads((tmp_path / VARIANT / "results.json").read_text())["integers"]
    assert results["differing"] == 0 and results["weight_bits"] == weight_bits
    assert results["integer"]["bytes"] < results["float"]["bytes"] / (3 if weight_bits == 8 else 10)
    printed = capsys.readouterr().out
    assert f"integers, {weight_bits}-bit weights" in printed
    assert "0 of 20 predictions differ" in printed and "conv2          conv2d [50, 20, 5, 5]" in printed


def test_convert_is_held_to_the_simulated_network(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(integers, "round_weights", lambda weight, bits: -weight)
    with pytest.raises(SystemExit) as caught:
        run(idx_folder, tmp_path, "--epochs", "1", "--convert")
    assert "of 20 predictions" in str(caught.value)


def test_help():
    command = [sys.executable, "-m", "coarsegrad", "mnist", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in ("--bits", "--learn-alpha", "--out", "--data", "same results"):
        assert option in " ".join(done.stdout.split())


# Parts of it


def test_quantized_starts_from_the_float_network(idx_folder, tmp_path, monkeypatch):
    starts = {}
    monkeypatch.setattr(
        mnist,
        "fit",
        lambda model, *args: (
            starts.update({args[2]["phase"]: {k: v.clone() for k, v in model.state_dict().items()}}),
            fit(model, *args),
        )[1],
    )
    fit = training.fit
    run(idx_folder, tmp_path)
    trained = torch.load(tmp_path / "float.pt", weights_only=True)["model"]
    assert not torch.equal(trained["conv1.weight"], starts["float"]["conv1.weight"])
    new = {f"act{i}.{key}" for i in (1, 2, 3) for key in ("alpha", "_extra_state")}
    assert starts["quantized"].keys() - trained.keys() == new
    assert all(torch.equal(starts["quantized"][name], value) for name, value in trained.items())


def test_float32_is_float32_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert usable_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_learned_alpha_stays_positive():
    model = quantized(lenet5(nn.ReLU), 2, "relu", "ceil", "exact")
    optimizer = training.make_optimizer(model, lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    weights = model.fc2.weight.detach().clone()
    layers = [module for module in model.modules() if isinstance(module, cg.QReLU)]
    before = [layer.alpha.item() for layer in layers]
    optimizer.step()
    assert len(layers) == 3
    assert [layer.alpha.item() for layer in layers] == [alpha / 2 for alpha in before]
    assert bool((model.fc2.weight < weights - 1e5).all())


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
