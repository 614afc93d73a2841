"""Networks, and steps through them, for the tests of packing."""

from __future__ import annotations

import contextlib

import torch
from saved_bytes import Kept
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments.transformers import OPT_125M, T5_SMALL, Opt, T5Encoder

SMALL = {"layers": 2, "width": 16, "heads": 2, "inner": 16, "hidden": 48, "vocabulary": 30, "positions": 12}


def mlp(activation):
    return nn.Sequential(nn.Linear(11, 37), activation(), nn.Linear(37, 23), activation(), nn.Linear(23, 5))


def cnn(activation):
    """Convolutions, both kinds of pooling, and a flatten."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), activation(),
        nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), activation(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def opt(activation):
    return Opt(OPT_125M.resized(**SMALL), activation)


def t5(activation):
    return T5Encoder(T5_SMALL.resized(dropout=0.0, **SMALL), activation)


def images(dtype):
    return torch.randn(2, 3, 8, 8).to(dtype)


def tokens(dtype):
    return torch.randint(30, (2, 12))


CASES = {
    "mlp": (mlp, lambda dtype: torch.randn(9, 11).to(dtype)),
    "cnn": (cnn, images),
    "cnn channels-last": (cnn, lambda dtype: images(dtype).to(memory_format=torch.channels_last)),
    "opt": (opt, tokens),
    "t5": (t5, tokens),
}


def build(case, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    make_model, make_input = CASES[case]
    settings = {"bits": 2, "alpha": 0.25, **settings}
    model = make_model(lambda: cg.QReLU(**settings)).to(dtype)
    x = make_input(dtype)
    if "last" in case:
        model = model.to(memory_format=torch.channels_last)
    return model, x.requires_grad_(x.is_floating_point())


def gradients(model, x, block=None):
    """The loss and every gradient of a step whose forward runs in `block`."""
    model.zero_grad()
    x.grad = None
    with block or contextlib.nullcontext():
        loss = model(x).square().sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad, "loss": loss.detach()}
    assert all(g is not None for name, g in found.items() if name != "x")
    return {name: g.clone() for name, g in found.items() if g is not None}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def kept_bytes(forward, *not_counted):
    """Bytes kept by `forward()`, whatever packs them, without those of the tensors given."""
    with Kept(*not_counted) as kept:
        result = forward()
    return kept.bytes, result


def packed_forward(model, x):
    with cg.packed_activations():
        return model(x)
