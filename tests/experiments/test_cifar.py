"""CIFAR-10: its files, the augmentation, the two networks, and a table of both on a handful of images."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments import cifar, cifar_table, models
from coarsegrad.experiments.table_runs import Run, Schedule

EACH, BATCH = 4, 5  # images of a file, and of a step
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def records(number):
    return np.random.default_rng(number).integers(0, 256, (EACH, 3072), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six files as CIFAR-10's binary version has them: a byte of class, 1024 of red, of green, of blue."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(FILES):
        classes = ((np.arange(EACH) + number) % 10).astype(np.uint8)
        (folder / name).write_bytes(np.column_stack([classes, records(number)]).tobytes())
    return folder


def test_files_are_read(folder):
    train, test, sha256 = cifar.load_cifar10(folder)
    assert train.x.shape == (5 * EACH, 3, 32, 32) and test.x.shape == (EACH, 3, 32, 32)
    assert train.x.dtype == torch.float32 and train.y.dtype == torch.int64
    assert train.y.tolist() == [(i + number) % 10 for number in range(5) for i in range(EACH)]
    green = records(2)[1, 1024 + 7 * 32 + 30]
    assert train.x[2 * EACH + 1, 1, 7, 30].item() == pytest.approx((green / 255 - 0.4822) / 0.2435, abs=1e-6)
    (folder / FILES[0]).write_bytes((folder / FILES[0]).read_bytes()[:-1] + b"\7")
    assert cifar.load_cifar10(folder)[2] != sha256


def test_bad_files_are_named(folder, tmp_path):
    with pytest.raises(cifar.ExperimentError, match="--data must name the folder"):
        cifar.load_cifar10(None)
    with pytest.raises(cifar.ExperimentError, match="not a folder"):
        cifar.load_cifar10(tmp_path / "nowhere")
    path = folder / "data_batch_3.bin"
    good = path.read_bytes()
    for content, message in [
        (good[:-1], "data_batch_3.bin is damaged: 12,291 bytes, wanted a multiple of 3,073"),
        (b"", "data_batch_3.bin is damaged: 0 bytes"),
        (b"\x0a" + good[1:], "data_batch_3.bin has the label 10, wanted 0..9"),
    ]:
        path.write_bytes(content)
        with pytest.raises(cifar.ExperimentError, match=message):
            cifar.load_cifar10(folder)
    path.unlink()
    with pytest.raises(cifar.ExperimentError, match="lacks data_batch_3.bin; wanted the unpacked binary version"):
        cifar.load_cifar10(folder)


def test_crop_and_flip_gives_shifted_and_mirrored_images():
    x = torch.rand(200, 2, 6, 5) + 1
    torch.manual_seed(3)
    got = cifar.crop_and_flip(x)
    torch.manual_seed(3)
    assert torch.equal(got, cifar.crop_and_flip(x))
    places = []
    for before, after in zip(x, got):
        padded = nn.functional.pad(before, (4, 4, 4, 4))
        fits = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(after, padded[:, top : top + 6, left : left + 5].flip(2 if mirrored else ()))
        ]
        assert fits
        places.append(fits[0])
    # Each of the three for itself: 200 images, 81 places, two sides.
    assert len({(top, left) for top, left, _ in places}) > 60
    assert 70 < sum(mirrored for _, _, mirrored in places) < 130


@pytest.mark.parametrize(
    "network, weighted, activations",
    [(models.lenet5, 4, 3), (models.vgg11, 9, 8), (models.resnet20, 20, 19)],
    ids=["lenet5", "vgg11", "resnet20"],
)
def test_batch_norm_precedes_every_activation(network, weighted, activations):
    torch.manual_seed(0)
    float_model = network(nn.ReLU)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in float_model.modules()) == weighted
    model = models.quantized(float_model, 2, "relu", learn_alpha="exact", per_channel=True)
    inputs = []
    for module in model.modules():
        if isinstance(module, cg.QReLU):
            module.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0].detach())))
    x = 4 * torch.randn(4, *((1, 28, 28) if network is models.lenet5 else (3, 32, 32)))
    assert model(x).shape == (4, 10) and len(inputs) == activations
    for module, value in inputs:
        assert module.alpha.shape == (value.size(1),) and module.alpha.requires_grad
        channels = value.transpose(0, 1).flatten(1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(value.size(1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(channels.var(1, correction=0), torch.ones(value.size(1)), atol=0.05, rtol=0)
    assert all(not isinstance(module, cg.QReLU) for module in float_model.modules())
    assert set(float_model.state_dict()) < set(model.state_dict())
    weights = float_model.state_dict()
    assert all(value.equal(weights[name]) for name, value in models.quantized(float_model, 2).state_dict().items()
               if name in weights)  # fmt: skip


@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_a_table_on_a_handful_of_images(name, folder, tmp_path, monkeypatch, capsys):
    short = Schedule(1, (), 1, (), lr=0.01, batch_size=BATCH)
    small = dataclasses.replace(cifar_table.TABLES[name], schedules={"full": short}, runs=(Run("full", 2, "relu"),))
    monkeypatch.setitem(cifar_table.TABLES, name, small)
    parser = argparse.ArgumentParser()
    cifar_table.add_arguments(parser)
    threads = torch.get_num_threads()
    options = ["--data", str(folder), "--threads", "1", "--out", str(tmp_path / "NETWORK")]
    try:
        cifar_table.main(parser.parse_args([name, *options]))
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert small.title in printed and "float 1/1" in printed and "quantized 1/1" in printed
    result = json.loads((tmp_path / name / "full" / "2bit-relu-seed0" / "results.json").read_text())
    assert result["config"]["batch_size"] == BATCH and len(result["history"]) == 1
