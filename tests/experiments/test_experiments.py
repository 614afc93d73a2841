"""The main job: its data, resuming to the same bits, and what it leaves behind. On small IDX files."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments import data, download, integers, mnist, training
from coarsegrad.experiments.arguments import usable_device
from coarsegrad.experiments.files import ExperimentError, replacing
from coarsegrad.experiments.models import lenet5, quantized

BATCH = 16
TRAIN, TEST = 3 * BATCH + 5, 20
OPTIONS = ["--batch-size", str(BATCH), "--threads", "1", "--float-epochs", "2", "--epochs", "3"]
VARIANT = "2bit-clipped_relu-nearest"


def idx_bytes(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def small_arrays():
    """Noise with a bright row whose height is the class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", TRAIN), ("test", TEST)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), 2 * labels + 4] = 250
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return arrays


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    for number, (name, array) in enumerate(small_arrays().items()):
        content = idx_bytes(array)
        file = data._IDX_NAMES[name]
        if number % 2:
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / file).write_bytes(content)
    return folder


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


# Data


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 28, 28), (0,)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_is_read(tmp_path, shape, pack):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "file").write_bytes(pack(idx_bytes(array)))
    read = data.read_idx(tmp_path / "file")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


GOOD_IDX = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD_IDX[:-1], "damaged: 23 bytes, but its header says 24"),
        (GOOD_IDX + b"\0", "damaged: 25 bytes"),
        (GOOD_IDX[:7], "damaged"),
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d" + GOOD_IDX[3:], "0x00000d02"),
        (b"PK\x03\x04 something else", "not an IDX file"),
        # Without a time stamp: the bytes are a part of the test's name, which must be the
        # same in every worker.
        (gzip.compress(GOOD_IDX, mtime=0)[:-5], "cannot read"),
    ],
)
def test_bad_idx_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        data.read_idx(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_idx_folder_gives_standardised_images(idx_folder):
    got, arrays = data.load_mnist(idx_folder), small_arrays()
    for part in ("train", "test"):
        split = getattr(got, part)
        pixels = arrays[f"{part}_images"].astype(np.float64)[:, None]
        np.testing.assert_allclose(split.x.numpy(), (pixels / 255 - 0.1307) / 0.3081, atol=1e-6)
        assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
        np.testing.assert_array_equal(split.y.numpy(), arrays[f"{part}_labels"])
    assert got.sha256 == data._digest(arrays)


def test_missing_and_mismatched_idx_files_are_named(idx_folder, tmp_path):
    with pytest.raises(ExperimentError, match="not a folder"):
        data.load_mnist(tmp_path / "nowhere")
    for path in idx_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(idx_bytes(np.zeros(TEST - 1, np.uint8)))
    with pytest.raises(ExperimentError, match=rf"{labels} has shape \({TEST - 1},\), wanted \({TEST},\)"):
        data.load_mnist(tmp_path)
    labels.write_bytes(idx_bytes(np.full(TEST, 10, np.uint8)))
    with pytest.raises(ExperimentError, match="label 10, wanted 0..9"):
        data.load_mnist(tmp_path)
    labels.unlink()
    with pytest.raises(ExperimentError, match="lacks t10k-labels-idx1-ubyte "):
        data.load_mnist(tmp_path)


def python2_pickle(sets):
    """A pickle of pairs of arrays as Python 2 and numpy 1 wrote it, opcode by opcode."""

    def array(value):
        code = value.dtype.str[1:].encode()
        raw = value.tobytes()
        shape = b"(" + b"".join(b"J" + size.to_bytes(4, "little") for size in value.shape) + b"t"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01"
            + shape
            + b"cnumpy\ndtype\n(U\x02"
            + code
            + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + b"T"
            + len(raw).to_bytes(4, "little")
            + raw
            + b"tb"
        )

    return b"\x80\x02(" + b"".join(b"(" + array(x) + array(y) + b"t" for x, y in sets) + b"t."


def write_wheel(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(data._WHEEL_MEMBER, gzip.compress(content))


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel with the small arrays, its validation set the last 10 training images; and who fetched it."""
    arrays = small_arrays()
    pixels = {part: (arrays[f"{part}_images"].reshape(-1, 784) / 256).astype("<f4") for part in ("train", "test")}
    labels = {part: arrays[f"{part}_labels"].astype("<i8") for part in ("train", "test")}
    train, validation = slice(None, -10), slice(-10, None)
    path = tmp_path / "small.whl"
    write_wheel(
        path,
        python2_pickle(
            [
                (pixels["train"][train], labels["train"][train]),
                (pixels["train"][validation], labels["train"][validation]),
                (pixels["test"], labels["test"]),
            ]
        ),
    )
    fetched = []
    monkeypatch.setattr(data, "download", lambda what, requirement, *rest: fetched.append(requirement) or path)
    monkeypatch.setattr(data, "_MNIST_SHA256", data._digest(arrays))
    return path, fetched


def test_wheel_is_fetched_once_and_equals_the_idx_files(wheel, idx_folder, capsys):
    _, fetched = wheel
    first, second, idx = data.load_mnist(), data.load_mnist(), data.load_mnist(idx_folder)
    assert len(fetched) == 1
    assert [path.name for path in download.cache_folder().iterdir()] == ["mnist.npz"]
    assert first.sha256 == second.sha256 == idx.sha256
    for one in (first, second):
        assert all(torch.equal(a, b) for a, b in zip((*one.train, *one.test), (*idx.train, *idx.test), strict=True))

    (download.cache_folder() / "mnist.npz").write_bytes(b"PK\x03\x04 half a file")
    assert data.load_mnist().sha256 == idx.sha256 and len(fetched) == 2
    assert "damaged" in capsys.readouterr().err


def test_another_wheel_is_refused_and_nothing_cached(monkeypatch, tmp_path, capfd):
    write_wheel(tmp_path / f"{data._REQUIREMENT.replace('-', '_').replace('==', '-')}-py3-none-any.whl", b"other")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ExperimentError, match="could not download MNIST"):
        data.load_mnist()
    assert f"Expected sha256 {data._WHEEL_SHA256}" in capfd.readouterr().err
    assert list(download.cache_folder().iterdir()) == []


class Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call, argument", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (np.save, "{}")])
def test_unpickler_knows_nothing_but_arrays(tmp_path, call, argument):
    mark = tmp_path / "mark"
    content = pickle.dumps(Malicious(call, argument.format(str(mark))), protocol=2)
    with pytest.raises(ExperimentError, match="refused a pickle that uses"):
        data._unpickle_arrays(content)
    assert not mark.exists()


def test_without_network_the_message_says_what_to_do(monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ExperimentError, match="could not download MNIST.*--data FOLDER.*train-images-idx3-ubyte"):
        data.load_mnist()


def test_real_mnist(monkeypatch):
    monkeypatch.undo()  # the user's own cache
    cached = download.cache_folder() / "mnist.npz"
    if not cached.exists():
        pytest.skip(f"MNIST is not cached in {cached.parent}; `python -m coarsegrad mnist` fetches it")
    real = data.load_mnist()
    assert real.train.x.shape == (60000, 1, 28, 28) and real.test.x.shape == (10000, 1, 28, 28)
    assert real.train.y[:5].tolist() == [5, 0, 4, 1, 9] and real.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(real.train.x.mean()) < 1e-3 and abs(real.train.x.std() - 1) < 1e-3


# The job


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
    calls = 0

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return training_step(*args)

    training_step = training.train_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(training, "train_step", step)
        run(idx_folder, tmp_path)
    assert ended.value.code == 130
    assert "the same command to continue" in capsys.readouterr().out
    assert (tmp_path / "float.pt").exists() == (call > 3)
    torch.manual_seed(99)  # nothing hangs on the generator's state
    run(idx_folder, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


def test_kill_and_resume_give_the_same_bits(idx_folder, tmp_path):
    long = ["--epochs", "40", "--learn-alpha", "exact"]
    variant = f"{VARIANT}-exact_alpha"
    command = [
        sys.executable,
        "-m",
        "coarsegrad",
        "mnist",
        "--data",
        str(idx_folder),
        "--out",
        str(tmp_path / "killed"),
    ]
    checkpoint = tmp_path / "killed" / variant / "checkpoint.pt"
    process = subprocess.Popen([*command, *OPTIONS, *long], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    assert len(torch.load(checkpoint, weights_only=True)["history"]) < 40

    run(idx_folder, tmp_path / "killed", *long)
    run(idx_folder, tmp_path / "whole", *long)
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
