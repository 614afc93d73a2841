"""Programs of torch.export: they train as the model does, to the bit, and can be kept in a file."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from saved_bytes import Kept
from torch import nn

import coarsegrad as cg


@pytest.fixture(autouse=True)
def own_ste():
    with cg.register_ste("own", lambda u, q: torch.exp(-u) * (u > 0), needs="codes"):
        yield


def linear(act):
    return nn.Sequential(nn.Linear(8, 8), cg.nn.QReLULinear(act, nn.Linear(8, 4)))


def conv2d(act):
    return nn.Sequential(nn.Conv2d(2, 4, 3), cg.nn.QReLUConv2d(act, nn.Conv2d(4, 3, 3, stride=2, padding=1)))


def plain(act):
    return nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 4))


MODELS = {
    "linear": lambda: linear(cg.QReLU(2, learn_alpha=True)),
    "linear, relu": lambda: linear(cg.QReLU(2, ste="relu")),
    "linear, own STE": lambda: linear(cg.QReLU(2, ste="own", learn_alpha=True, alpha_grad="exact")),
    "conv2d": lambda: conv2d(cg.QReLU(2, learn_alpha=True, num_channels=4, alpha_scale="lsq")),
    "own STE": lambda: plain(cg.QReLU(2, ste="own", learn_alpha=True)),
    "in place": lambda: plain(cg.QReLU(2, inplace=True)),
    "own STE, in place": lambda: plain(cg.QReLU(2, ste="own", inplace=True)),
    "squared": lambda: plain(cg.QReLU(2, squared=True, learn_alpha=True, alpha_scale="lsq")),
}


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def same(got, want):
    return len(got) == len(want) and all(g is not None and torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_trains_as_the_model(name, strict):
    torch.manual_seed(0)
    model = MODELS[name]()
    shape = (2, 7, 7) if "conv2d" in name else (8,)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (torch.randn(6, *shape),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    for rows in (6, 9):
        x = torch.randn(rows, *shape)
        want = gradients(model, x)
        assert same(gradients(program, x), want) and all(g.any() for g in want)


def test_a_program_keeps_codes():
    model = linear(cg.QReLU(2, ste="relu"))
    program = torch.export.export(model, (torch.randn(32, 8),)).module()
    x = torch.randn(32, 8)
    with Kept(x, *program.parameters(), *program.buffers()) as kept:
        out = program(x)
    assert kept.bytes == 32 * 8 * 2 // 8  # codes of 2 bits, which are the mask of relu too
    out.sum().backward()


def test_a_program_in_a_file():
    model, x = MODELS["conv2d"](), torch.randn(6, 2, 7, 7)
    file = io.BytesIO()
    torch.export.save(torch.export.export(copy.deepcopy(model), (x,)), file)
    file.seek(0)
    assert same(gradients(torch.export.load(file).module(), x), gradients(model, x))
